"""The state folder: one running cluster's lock, addresses and logs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.config import Config
from cluster.errors import AlreadyExists, ConfigError, NotFound


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """How to reach a running cluster: what cluster.json holds.

    Addresses are host:port (gRPC) except `http`, which are URLs. `gateways` is empty until the cluster
    is ready. `process_started` tells the process from a later one with the same number.
    """

    process_id: int
    process_started: int
    controller: str
    model: str
    gateways: tuple[str, ...] = ()
    http: tuple[str, ...] = ()


class StateFolder:
    """The folder of one user's cluster, private to that user; shared by it and the command line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record_file = path / "cluster.json"
        self._lock_file = path / "cluster.lock"

    @classmethod
    def of(cls, config: Config) -> StateFolder:
        """The configured folder, or the user's."""
        return cls(Path(config.state_dir).expanduser().absolute() if config.state_dir else default_path())

    @property
    def logs(self) -> Path:
        """Where each role process writes WORKER.log."""
        return self.path / "logs"

    def prepare(self) -> None:
        """Make the folder, for this user alone; one that was there keeps its mode unless it is the default
        one. Raises ConfigError when it cannot be used.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.path == default_path():
                self.path.chmod(0o700)
            self.logs.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"state_dir: {self.path} cannot be used: {error.strerror}") from error

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the folder for one cluster. Raises AlreadyExists while another process holds it."""
        self.prepare()
        with self._lock_file.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlreadyExists(self._refusal()) from error
            try:
                yield
            finally:
                self._record_file.unlink(missing_ok=True)

    def write(self, record: ClusterRecord) -> None:
        """Publish the record; readers see the old one or the new one.

        Raises ConfigError, as on a full disk; the old one stays then.
        """
        draft = self._record_file.with_suffix(f".{os.getpid()}")
        try:
            draft.write_text(json.dumps(asdict(record), indent=2) + "\n")
            draft.replace(self._record_file)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise ConfigError(f"state_dir: {self.path} cannot be written to: {error.strerror}") from error

    def read(self) -> ClusterRecord:
        """The record of the cluster that runs. Raises NotFound when none does, the file of a dead one
        included.
        """
        try:
            raw = json.loads(self._record_file.read_text())
            raw["gateways"], raw["http"] = tuple(raw["gateways"]), tuple(raw["http"])
            record = ClusterRecord(**raw)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NotFound(f"no cluster runs here ({self.path}); start one with `anabranch up`") from error
        if process_start(record.process_id) != record.process_started:
            raise NotFound(
                f"the cluster recorded in {self.path} (process {record.process_id}) is dead; start one with "
                "`anabranch up`"
            )
        return record

    def _refusal(self) -> str:
        try:
            record = self.read()
            who = f"process {record.process_id}, controller at {record.controller}"
        except NotFound:
            who = "just starting or stopping"
        return (
            f"a cluster runs already with the state folder {self.path} ({who}): `anabranch down` stops it; "
            "another beside it needs a folder and ports of its own: --set state_dir=FOLDER --port 0 "
            "--http-port 0 --set controller.port=0"
        )


def default_path() -> Path:
    """$XDG_STATE_HOME/anabranch, or ~/.local/state/anabranch."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "anabranch"


def process_start(process_id: int) -> int:
    """When a process started, in kernel ticks since boot; 0 if there is none, or no way to know."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
