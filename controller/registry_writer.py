"""Membership and directory as the registry has them: written by the controller alone, on a thread of its own.

No call of a member waits for the registry. What is lost while it is away is written when it is back.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge

from anabranch.v1 import control_pb2
from anabranch.wire import agreement, registration
from cluster.clock import Clock, monotonic
from cluster.config import Config
from cluster.errors import AnabranchError, Fenced, Internal, ResourceExhausted, Unauthenticated
from cluster.registry.interface import ControllerRecord, MemberRecord, Registry, RegistryView
from cluster.registry.opening import open_registry
from cluster.telemetry import logger
from cluster.types import Epoch, WorkerId
from controller.directory_copy import DirectoryCopy
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable

_log = logger("registry")

_RETRY_MOST_S = 2.0
_REFRESH_S = 2.0
"""How often loads are written, and leases renewed; what else changes is written in the next round."""
_CLOSE_S = 5.0
_COPY_SHARE = 0.2
"""Of a heartbeat, for writing the directory."""


class RegistryState(enum.Enum):
    """How the registry stands to this controller."""

    UP = "up"
    READ_ONLY = "refuses writes"
    AWAY = "away"
    TAKEN = "taken by another controller"


class RegistryWriter:
    """Keeps the registry equal to the membership table, and its blocks to the directory (`DirectoryCopy`).

        AWAY <--does not answer-- UP --full--> READ_ONLY      back: everything is written again
          +------answers---------> ^ <--has room---+
                                   |
                                   +--another controller took over--> TAKEN (for good: it writes no more)

    The first time the registry answers, the table gets from it who lived under an earlier controller,
    unless `inherits` is off: then those are known to be gone. `on_taken` is called once, when another
    controller took over.
    """

    def __init__(
        self,
        registry: Registry,
        table: MembershipTable,
        directory: DirectoryKeeper,
        *,
        inherits: bool = True,
        on_taken: Callable[[], None] = lambda: None,
        clock: Clock = monotonic,
    ) -> None:
        self._registry = registry
        self._table = table
        self._copy = DirectoryCopy(directory, _COPY_SHARE * table.terms.heartbeat_ms / 1000, clock)
        self._on_taken = on_taken
        self._controller: ControllerRecord | None = None
        self._inherits = inherits
        self._clock = clock
        self._state: RegistryState | None = None
        self._has_claimed = False
        self._written: dict[WorkerId, tuple[Epoch, bytes]] = {}
        self._refresh_next_s = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)
        self.metrics = CollectorRegistry()
        self._up = Gauge(
            "anabranch_registry_up", "1 while the registry takes what is written.", registry=self.metrics
        )
        self._blocks = Gauge(
            "anabranch_registry_blocks",
            "Blocks of the directory in the registry.",
            registry=self.metrics,
        )

    @property
    def state(self) -> RegistryState:
        """As of the last round."""
        return self._state or RegistryState.AWAY

    @property
    def is_away(self) -> bool:
        """Whether nobody's silence may be taken for death: this side may be the one that is cut off."""
        return self.state in (RegistryState.AWAY, RegistryState.TAKEN)

    def inherit(self) -> None:
        """Tell the table who lived, before anybody asks it. A registry that is away is no error.

        Raises Unauthenticated when it refuses the password.
        """
        try:
            self._restore(self._registry.read())
        except Unauthenticated:
            raise
        except AnabranchError as error:
            self._enter(RegistryState.AWAY, error)

    def claim(self, welcome: control_pb2.RegisterResponse, address: str, config_digest: str) -> None:
        """Be the one that writes from now on: a controller at host:port that welcomes its members so."""
        epoch = Epoch(welcome.responder.epoch)
        self._controller = ControllerRecord(
            epoch, address, agreement(config_digest), welcome.SerializeToString()
        )
        self.write()

    def start(self) -> None:
        """Go on writing by itself; after `claim`."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left, and stop. Idempotent."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        self._registry.close()

    def write(self) -> None:
        """One round: make the registry equal to the table; what fails in it counts as the registry's absence.
        After `claim`.
        """
        assert self._controller is not None
        try:
            self._write(self._controller)
        except Fenced as error:
            self._enter(RegistryState.TAKEN, error)
        except ResourceExhausted as error:
            self._copy.give_way(self._registry, self._controller.epoch, error)
            self._enter(RegistryState.READ_ONLY, error)
        except AnabranchError as error:
            self._enter(RegistryState.AWAY, error)
        except Exception as error:  # noqa: BLE001  a bug in one round must not end all later ones
            _log.error("registry_round_failed", error=error)
            self._enter(RegistryState.AWAY, Internal(f"{type(error).__name__}: {error}"))
        else:
            self._enter(RegistryState.UP)

    def _run(self) -> None:
        heartbeat_s = pause_s = self._table.terms.heartbeat_ms / 1000
        while not self._closing.wait(pause_s):
            self.write()
            if self.state is RegistryState.TAKEN:
                return
            if self.state is not RegistryState.UP:
                pause_s = min(2 * max(pause_s, heartbeat_s), _RETRY_MOST_S)
            else:
                pause_s = 0.0 if self._copy.is_reading else heartbeat_s
        if self.state is RegistryState.UP:
            self.write()

    def _write(self, controller: ControllerRecord) -> None:
        if self._state is not RegistryState.UP:
            self._begin_again(controller)
        now_s = self._clock()
        is_refresh = now_s >= self._refresh_next_s
        self._registry.claim(controller, take_over=False)
        version, living = self._table.registrations()
        records = {WorkerId(each.member.worker_id): each for each in living}
        core = {worker: _core(each) for worker, each in records.items()}
        due = [worker for worker in core if is_refresh or core[worker] != self._written.get(worker)]
        present = [_record(records[worker]) for worker in due]
        gone = [(worker, epoch) for worker, (epoch, _) in self._written.items() if worker not in records]
        if present or gone or is_refresh:
            refused = self._registry.publish(controller.epoch, version, present, gone)
            if refused:
                _log.warning("registry_refused_members", members=sorted(refused))
        self._written = core
        if is_refresh:
            self._refresh_next_s = now_s + _REFRESH_S
        self._copy.write(self._registry, controller.epoch, is_refresh=is_refresh)
        self._blocks.set(self._copy.kept or 0)

    def _begin_again(self, controller: ControllerRecord) -> None:
        """Nothing is certain of what is in there: look, and mark all of it for writing."""
        self._copy.lose_track()
        if not self._has_claimed:
            self._registry.claim(controller, take_over=True)
        view = self._registry.read()
        if not self._has_claimed:
            self._restore(view)  # again: an earlier controller may have written since
            self._copy.inherit(self._registry)
        self._has_claimed = True
        self._written = {record.worker: (record.epoch, b"") for record in view.members}
        self._refresh_next_s = 0.0

    def _restore(self, view: RegistryView) -> None:
        if not self._inherits:
            return
        known = []
        for record in view.members:
            try:
                known.append(registration(record.body))
            except Internal as error:  # whoever it is will register here
                _log.warning("member_not_restored", member=record.worker, problem=error.message)
        if restored := self._table.restore(known, view.past, view.version):
            _log.info("membership_restored", members=restored, version=view.version)

    def _enter(self, state: RegistryState, error: AnabranchError | None = None) -> None:
        """Note the state; a change of it is logged once."""
        before, self._state = self._state, state
        self._up.set(state is RegistryState.UP)
        if state is before:
            return
        if state is RegistryState.TAKEN:
            self._on_taken()
        if error is None:
            _log.info("registry_up")
        else:
            _log.warning("registry_state", state=state.value, problem=error.message)


@contextmanager
def registry_writer(
    config: Config,
    table: MembershipTable,
    directory: DirectoryKeeper,
    *,
    inherits: bool = True,
    on_taken: Callable[[], None] = lambda: None,
) -> Iterator[RegistryWriter]:
    """A writer that has told the table who lived; stopped at the end. Raises ConfigError, Unauthenticated."""
    registry = open_registry(config.registry)
    writer = RegistryWriter(registry, table, directory, inherits=inherits, on_taken=on_taken)
    try:
        writer.inherit()
        yield writer
    finally:
        writer.close()


def _record(registration: control_pb2.RegisterRequest) -> MemberRecord:
    member = registration.member
    return MemberRecord(WorkerId(member.worker_id), Epoch(member.epoch), registration.SerializeToString())


def _core(registration: control_pb2.RegisterRequest) -> tuple[Epoch, bytes]:
    """What is written at once when it changes: all but the load."""
    bare = control_pb2.RegisterRequest()
    bare.CopyFrom(registration)
    bare.member.ClearField("load")
    return Epoch(registration.member.epoch), bare.SerializeToString()
