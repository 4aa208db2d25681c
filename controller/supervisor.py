"""What should run, what does, and what to do about the difference. Pure but for clock and hands.

The fleet tells what happened (`started`, `ended`, `lost`), the membership table who is `ready` or
`silent`; `tick` lets time pass. Decisions leave through `Hands`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, ConfigError, InvalidRequest, NotFound, Unavailable
from controller.placing import unplaceable
from controller.slots import Hands, Limits, NotPlaced, Phase, Place, Slot

DRAIN_ORDER = ("gateway", "dense", "attention")
"""Who stops first: each role needs those after it to finish its streams."""

EXIT_REFUSED = 2
"""Exit status of a process whose configuration or model cannot be served; see workers/role.py."""

_PLACE_AGAIN_S = 0.5
_STABLE_S = 30.0  # ready for this long: earlier failures are forgotten
_PAUSE_MOST_S = 30.0
_ANSWER_S = 3.0  # for a keeper to report a kill, before its node is suspected
_SUSPICION_S = 30.0
_WORDS_MOST = 300  # letters of a process's last line that are passed on
_LEAVING_S = 60.0  # for the node of a worker that retired to leave, before its slot is for another one
_LEAST_GRACE_S = 2.0  # for a role whose turn to drain comes after the grace was used up


class Supervisor:
    """The one writer of what each slot should do.

        WAITING --place--> STARTING --ready--> READY
           ^  ^               |  |               |
           |  |        ended, lost      silent, not ready in time
           |  |               |  |               |
           |  +--PAUSED <-----+  +--> ENDING <---+      (killed; no answer in time: abandoned,
           |       |                    |                its node suspected)
           |       +--too often--> GIVEN_UP
           +------------ ended ---------+

    `retire` takes one slot to STOPPED (and where limits are elastic, after `_LEAVING_S`, to WAITING), `drain`
    every one, role by role in DRAIN_ORDER. Not thread-safe, but `slots` may be read from any thread.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        limits: Limits,
        place: Place,
        hands: Hands,
        observe: Callable[[Slot], None] = lambda _slot: None,
        clock: Clock = monotonic,
    ) -> None:
        self._clock = clock
        self._limits = limits
        self._slots = {slot.worker_id: self._begun(slot) for slot in slots}
        self._place = place
        self._hands = hands
        self._observe = observe
        self._place_next_s = clock()
        self._suspected: dict[str, float] = {}
        self._drain_until_s = 0.0
        self._draining: list[str] = []
        self.killed = 0
        """Processes that did not end within their grace."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot as it stands."""
        return tuple(self._slots.values())

    @property
    def is_ready(self) -> bool:
        """Whether all that should run does."""
        ready = {slot.role for slot in self.slots if slot.phase is Phase.READY}
        return all(
            slot.phase is Phase.READY or slot.retires or self._may_wait(slot, ready) for slot in self.slots
        )

    @property
    def is_stopped(self) -> bool:
        """Whether nothing runs any more, after `drain`."""
        return all(slot.phase is Phase.STOPPED for slot in self.slots)

    def failure(self, was_complete: bool) -> AnabranchError | None:
        """Why the cluster cannot serve. At its start one slot given up, or that no node can hold, is
        enough; later a role is allowed to be short of processes, but not to have none left.
        """
        given_up = [slot for slot in self.slots if slot.phase is Phase.GIVEN_UP]
        if was_complete:
            left = {slot.role for slot in self.slots if slot.phase not in (Phase.GIVEN_UP, Phase.STOPPED)}
            given_up = [slot for slot in given_up if slot.role not in left]
        if given_up:
            return _error_of(given_up[0])
        unplaced = None if was_complete else self._unplaced()
        return unplaceable(unplaced.worker_id, unplaced.problem) if unplaced else None

    def started(self, worker_id: str, attempt: int, process_id: int, log_file: str) -> None:
        """The process of an attempt runs."""
        slot = self._current(worker_id, attempt)
        if slot is not None:
            self._put(replace(slot, process_id=process_id, log_file=log_file))

    def ready(self, worker_id: str) -> None:
        """The process serves."""
        slot = self._slots.get(worker_id)
        if slot is not None and slot.phase is Phase.STARTING:
            self._enter(slot, Phase.READY, problem="")

    def ended(self, worker_id: str, attempt: int, status: int, last_line: str) -> None:
        """The process of an attempt has ended."""
        slot = self._current(worker_id, attempt)
        if slot is None:
            return
        if self._draining:
            self.killed += status == -signal.SIGKILL
        elif slot.retires:
            slot = replace(slot, problem=_describe(status, last_line) if status else "")
        elif slot.phase is not Phase.ENDING:
            slot = replace(slot, problem=_describe(status, last_line))
        self._failed(slot, final=status == EXIT_REFUSED)

    def lost(self, worker_id: str, attempt: int, reason: str) -> None:
        """Whatever held the process is gone: its node perhaps, which Ray may take for alive for a while."""
        slot = self._current(worker_id, attempt)
        if slot is not None:
            self._suspect(slot.node)
            self._failed(replace(slot, problem=reason), at_once=slot.failures == 0)

    def silent(self, worker_id: str) -> None:
        """A member stopped giving signs of life: whatever it is, it is replaced."""
        slot = self._slots.get(worker_id)
        if slot is not None and slot.phase in (Phase.STARTING, Phase.READY) and not self._draining:
            self._end(slot, "gave no sign of life")

    def tick(self) -> None:
        """Let time pass: place what waits, end what took too long."""
        now_s = self._clock()
        self._suspected = {node: until for node, until in self._suspected.items() if until > now_s}
        for slot in self.slots:
            if slot.due_s is not None and now_s >= slot.due_s:
                self._overdue(slot)
            elif slot.phase is Phase.READY and slot.failures and now_s - slot.since_s >= _STABLE_S:
                self._put(replace(slot, failures=0))
        if self._draining:
            self._drain_next()
        elif now_s >= self._place_next_s:
            self._place_next_s = now_s + _PLACE_AGAIN_S
            self._place_waiting()

    def retire(self, worker_id: str, grace_s: float) -> None:
        """Let one worker drain, with this much time, and leave its slot empty. Idempotent.

        Raises NotFound, and InvalidRequest for the last one of its role.
        """
        slot = self._slots.get(worker_id)
        if slot is None:
            raise NotFound(f"there is no {worker_id}: `anabranch status` lists the workers")
        if slot.retires or self._draining:
            return
        others = [other for other in self.slots if other.role == slot.role and other is not slot]
        if all(o.retires or o.phase is Phase.GIVEN_UP or self._is_vacant(o) for o in others):
            raise InvalidRequest(f"{worker_id} is the last {slot.role}: `anabranch down` stops the cluster")
        self._stop(replace(slot, retires=True), grace_s)

    def drain(self, grace_s: float) -> None:
        """Stop everything in DRAIN_ORDER, with this much time for open streams in all.

        Zero kills all at once, also what is draining already; else a second call changes nothing.
        """
        if grace_s <= 0:
            self._draining = list(DRAIN_ORDER[-1:])
            for slot in self.slots:
                self._stop(slot, 0.0)
        elif not self._draining:
            self._draining = list(DRAIN_ORDER)
            self._drain_until_s = self._clock() + grace_s
            self._drain_role()

    def _begun(self, slot: Slot) -> Slot:
        """An empty slot waits, one with a process has the time of a start to become ready."""
        now_s = self._clock()
        due_s = now_s + self._limits.start_timeout_s if slot.has_process else None
        return replace(slot, since_s=now_s, due_s=due_s)

    def _unplaced(self) -> Slot | None:
        """A slot no node could hold for too long."""
        since_s = self._clock() - self._limits.placement_timeout_s
        waiting = (slot for slot in self.slots if slot.phase is Phase.WAITING and slot.problem)
        filled = {slot.role for slot in self.slots if slot.has_process}
        return next((s for s in waiting if s.since_s < since_s and not self._may_wait(s, filled)), None)

    def _may_wait(self, slot: Slot, filled: Set[str]) -> bool:
        """Whether a slot may be without a node for good, given the roles of which a process runs."""
        return self._is_vacant(slot) and slot.role in filled

    def _is_vacant(self, slot: Slot) -> bool:
        """Whether a slot is for a node that may come."""
        return self._limits.elastic and slot.phase is Phase.WAITING and bool(slot.problem)

    def _current(self, worker_id: str, attempt: int) -> Slot | None:
        slot = self._slots.get(worker_id)
        return slot if slot is not None and slot.attempt == attempt and slot.has_process else None

    def _put(self, slot: Slot) -> None:
        changed = slot != self._slots[slot.worker_id]
        self._slots[slot.worker_id] = slot
        if changed:
            self._observe(slot)

    def _enter(
        self, slot: Slot, phase: Phase, due_s: float | None = None, problem: str | None = None
    ) -> None:
        said = slot.problem if problem is None else problem
        self._put(replace(slot, phase=phase, since_s=self._clock(), due_s=due_s, problem=said))

    def _place_waiting(self) -> None:
        if self._limits.elastic:
            self._vacate()
        waiting = [slot for slot in self.slots if slot.phase is Phase.WAITING]
        if not waiting:
            return
        occupied = [slot for slot in self.slots if slot.has_process]
        answers = self._place(waiting, occupied, frozenset(self._suspected))
        for slot in waiting:
            answer = answers[slot.worker_id]
            if isinstance(answer, NotPlaced):
                self._put(replace(slot, problem=answer.missing))
            else:
                self._launch(replace(slot, node=answer.node, attempt=slot.attempt + 1, process_id=0))

    def _vacate(self) -> None:
        """Slots whose workers retired long enough ago wait for the next node."""
        since_s = self._clock() - _LEAVING_S
        for slot in self.slots:
            if slot.retires and slot.phase is Phase.STOPPED and slot.since_s < since_s:
                self._enter(replace(slot, retires=False, failures=0), Phase.WAITING, problem="")

    def _launch(self, slot: Slot) -> None:
        self._enter(slot, Phase.STARTING, self._clock() + self._limits.start_timeout_s)
        self._hands.launch(self._slots[slot.worker_id])

    def _overdue(self, slot: Slot) -> None:
        if slot.phase is Phase.STARTING:
            self._end(slot, f"not ready within {self._limits.start_timeout_s:g} s")
        elif slot.phase is Phase.PAUSED:
            self._enter(slot, Phase.WAITING)
        elif slot.phase is Phase.ENDING:
            self._hands.abandon(slot)
            self._suspect(slot.node)
            self.killed += bool(self._draining)
            self._failed(replace(slot, problem=slot.problem or "did not end in time"), at_once=True)

    def _suspect(self, node: str) -> None:
        self._suspected[node] = self._clock() + _SUSPICION_S

    def _end(self, slot: Slot, problem: str) -> None:
        self._enter(slot, Phase.ENDING, self._clock() + _ANSWER_S, problem)
        self._hands.terminate(slot, 0.0)

    def _failed(self, slot: Slot, *, final: bool = False, at_once: bool = False) -> None:
        """An attempt is over: stop, pause and try again, or give up."""
        now_s = self._clock()
        if self._draining or slot.retires:
            self._enter(slot, Phase.STOPPED)
            return
        failures = slot.failures + 1
        slot = replace(slot, failures=failures, process_id=0, node="")
        if final or failures > self._limits.restarts_most:
            self._enter(slot, Phase.GIVEN_UP)
            return
        pause_s = min(self._limits.restart_backoff_s * 2 ** (failures - 1), _PAUSE_MOST_S)
        self._enter(slot, Phase.PAUSED, now_s + (0.0 if at_once else pause_s))

    def _drain_next(self) -> None:
        role = self._draining[0]
        if len(self._draining) > 1 and all(s.phase is Phase.STOPPED for s in self.slots if s.role == role):
            self._draining.pop(0)
            self._drain_role()

    def _drain_role(self) -> None:
        left_s = max(self._drain_until_s - self._clock(), _LEAST_GRACE_S)
        for slot in self.slots:
            if slot.role == self._draining[0]:
                self._stop(slot, left_s)

    def _stop(self, slot: Slot, grace_s: float) -> None:
        if not slot.has_process:
            self._enter(slot, Phase.STOPPED, problem="")
            return
        self._enter(slot, Phase.ENDING, self._clock() + grace_s + _ANSWER_S)
        self._hands.terminate(slot, grace_s)


def _describe(status: int, last_line: str) -> str:
    """How a process ended; its last words unless it was killed without a chance to say any."""
    by_signal = status < 0
    how = f"ended by {signal.Signals(-status).name}" if by_signal else f"ended with status {status}"
    return how if not last_line or status == -signal.SIGKILL else f"{how}: {last_line[:_WORDS_MOST]}"


def _error_of(slot: Slot) -> AnabranchError:
    """What a slot that was given up means for the whole start."""
    said = slot.problem.removeprefix(f"ended with status {EXIT_REFUSED}: ")
    if said != slot.problem:
        return ConfigError(f"{slot.worker_id}: {said}")
    return Unavailable(f"{slot.worker_id} was given up after {slot.attempt} starts: {slot.problem}")
