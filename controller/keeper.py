"""Keeps one role process on the node it runs on: starts it, ends it, tells how it ended, and to whom.

`controller.fleet` runs a Keeper as an actor; nothing here knows that. Imports are few, because every
role costs one of these processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cluster.errors import AlreadyExists, Fenced

CONFIG_PLACE = "{config}"
"""Stands in a command for the path of the configuration file on the keeper's node."""

PYTHON_PLACE = "{python}"
"""Stands in a command for the interpreter of the keeper's node."""

_LAUNCH = Path(__file__).with_name("launch.py")
_LOG_BYTES_MOST = 64 * 2**20
_TAIL_BYTES = 4096
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run: an absolute path or PYTHON_PLACE, then words of which one may be CONFIG_PLACE.

    `environment` is added to the node's own.
    """

    worker_id: str
    command: tuple[str, ...]
    config_text: str
    log_folder: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Started:
    """A process that runs."""

    process_id: int
    host: str
    log_file: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that ran: exit status (negative: ended by that signal) and its last words."""

    status: int
    last_line: str


@dataclass(frozen=True, slots=True)
class Held:
    """A process that a keeper holds on a node, as its next controller finds it."""

    launch: Launch
    started: Started
    node: str


@dataclass(frozen=True, slots=True)
class Outliving:
    """How long a keeper goes on without a controller, and what its process then gets to drain in; seconds."""

    absence_s: float
    grace_s: float


class Keeper:
    """One process of one slot, once.

        new --start--> running --exits, or terminate--> ended

    The process lives in its own session, so that a Ctrl-C in the terminal reaches it as a drain and
    not directly, and gets SIGTERM from the kernel when the keeper's process dies.

    It belongs to one controller, which waits for it again and again: that is how the keeper knows that this
    controller lives. When nothing was heard for a while another one may adopt it, and the first is fenced.
    With an `outliving` it ends itself where none came for so long; else it lives as long as who made it.
    """

    def __init__(self, controller: str, node: str, outliving: Outliving | None = None) -> None:
        """`controller` is a life of one, `node` is told to those that come after it."""
        self._controller = controller
        self._node = node
        self._heard_s = time.monotonic()
        self._news = threading.Condition()  # of the controller
        self._launch: Launch | None = None
        self._started: futures.Future[Started] = futures.Future()
        self._ended: futures.Future[Ended] = futures.Future()
        self._lock = threading.Lock()
        self._group: int | None = None  # process group to signal; None once it may belong to others
        self._signalled: signal.Signals | None = None
        if outliving is not None:
            threading.Thread(target=self._outlive, args=(outliving,), name="outliving", daemon=True).start()

    def start(self, launch: Launch) -> Started:
        """Start the process. Raises OSError when it cannot be started."""
        self._launch = launch
        # One thread starts and awaits the process: its death signal is tied to the starting thread.
        threading.Thread(target=self._keep, args=(launch,), name="keeper", daemon=True).start()
        return self._started.result()

    def adopt(self, controller: str, silence_s: float) -> Held | None:
        """Belong to another controller from now on; returns the process, if one runs.

        Raises AlreadyExists when the present one gives a sign of life within `silence_s` after its last.
        """
        with self._news:
            heard_s = self._heard_s
            left_s = heard_s + silence_s - time.monotonic()
            if self._news.wait_for(lambda: self._heard_s != heard_s, left_s):
                raise AlreadyExists("its controller lives")
            self._controller, self._heard_s = controller, time.monotonic()
            self._news.notify_all()
        if self._launch is None or self._ended.done():
            return None
        return Held(self._launch, self._started.result(_KILL_WAIT_S), self._node)

    def wait(self, controller: str, within_s: float) -> Ended | None:
        """How the process ended; None if it did not in this time. May be called before `start`.

        Raises Fenced for a controller that another one has replaced.
        """
        self._hear(controller)
        is_over = futures.wait([self._ended], within_s).done
        self._require(controller)
        return self._ended.result() if is_over else None

    def terminate(self, controller: str, grace_s: float) -> None:
        """SIGTERM, and SIGKILL to the process and its children after the grace. Idempotent. Raises Fenced."""
        self._require(controller)
        self._end(grace_s)

    def _hear(self, controller: str) -> None:
        with self._news:
            self._require(controller)
            self._heard_s = time.monotonic()
            self._news.notify_all()

    def _require(self, controller: str) -> None:
        if controller != self._controller:
            raise Fenced("another controller has this process now")

    def _outlive(self, outliving: Outliving) -> None:
        """End with the process when no controller was heard of for too long."""
        with self._news:
            while (left_s := self._heard_s + outliving.absence_s - time.monotonic()) > 0:
                self._news.wait(left_s)
        self._end(outliving.grace_s)
        os._exit(0)

    def _end(self, grace_s: float) -> None:
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            if futures.wait([self._ended], grace_s).done:
                return
        self._signal(signal.SIGKILL)
        futures.wait([self._ended], _KILL_WAIT_S)

    def _signal(self, number: signal.Signals) -> None:
        with self._lock:
            self._signalled = number
            if self._group is not None:
                os.killpg(self._group, number)

    def _reach(self, group: int) -> None:
        """Signals reach this group from now on; one that came too early reaches it now."""
        with self._lock:
            self._group = group
            if self._signalled is not None:
                os.killpg(group, self._signalled)

    def _keep(self, launch: Launch) -> None:
        try:
            self._ended.set_result(self._run(launch))
        except BaseException as error:
            for future in (self._started, self._ended):
                if not future.done():
                    future.set_exception(error)
            raise

    def _run(self, launch: Launch) -> Ended:
        log_file = _log_file(launch)
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config, log_file.open("ab") as log:
            config.write(launch.config_text)
            config.flush()
            began = log.tell()
            process = _spawn(launch, config.name, log)
            self._reach(process.pid)
            self._started.set_result(Started(process.pid, socket.gethostname(), str(log_file)))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            self._signal(signal.SIGKILL)  # children that outlived it; its number is still its own
            with self._lock:
                self._group = None
            return Ended(process.wait(), _last_line(log_file, began))


def _log_file(launch: Launch) -> Path:
    """WORKER.log, emptied into WORKER.log.1 when it has grown too large."""
    folder = Path(launch.log_folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / f"{launch.worker_id}.log"
    if file.exists() and file.stat().st_size > _LOG_BYTES_MOST:
        file.replace(file.with_suffix(".log.1"))
    return file


def _spawn(launch: Launch, config_file: str, log: BinaryIO) -> subprocess.Popen[bytes]:
    places = {CONFIG_PLACE: config_file, PYTHON_PLACE: sys.executable}
    command = [places.get(word, word) for word in launch.command]
    # Roles know nothing of Ray; its token is none of their business.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment | launch.environment,
        start_new_session=True,
    )


def _last_line(log_file: Path, began: int) -> str:
    """The last line that is not empty of what was logged since `began`."""
    with log_file.open("rb") as log:
        log.seek(max(began, log_file.stat().st_size - _TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
