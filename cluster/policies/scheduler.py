"""Continuous batching with chunked prefill, preemption by recompute, priorities and deadlines. Pure.

Iteration-level scheduling is Orca's (OSDI '22), chunked prefill under a token budget Sarathi-Serve's
(OSDI '24). There are no prefill and decode phases: one counter (`computed`) catches up with another
(`length`), after a prompt, a preemption, a loss and a sampled token alike.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import inf

from cluster.errors import AlreadyExists, DeadlineExceeded, ResourceExhausted
from cluster.policies.ranges import Range, end_of_room
from cluster.policies.scheduler_state import RoomRequest, Row, SchedulerLimits, SequenceState, StepPlan
from cluster.types import SequenceKey

__all__ = ["RoomRequest", "Row", "Scheduler", "SchedulerLimits", "StepPlan"]


def _rank(sequence: SequenceState) -> tuple[int, int]:
    return sequence.rank


class Scheduler:
    """Decides what each step computes. Owns every sequence's counters; not thread-safe.

        submit              room for all known tokens + ahead, and a slot
          |      +---------+ -----------------------------------------> +---------+
          +----> | WAITING |                                            | RUNNING | --+ rows, room asked for
                 +---------+ <----------------------------------------- +---------+ <-+ ahead, holes refilled
                        |  preempted, begins anew: loses room and counter |
                        | hold                                      hold  |
                        v                                                 |
                 +---------+ <--------------------------------------------+
                 |  HELD   |  keeps all it has, takes no step; whoever goes on with it submits it anew
                 +---------+      any state -- finish, expired, exhausted --> gone

    Order is rank: priority (lower first), then arrival. Invariants:
    * A plan has at most `step_tokens` tokens and `max_batch` rows, each sequence at most once.
    * Waiting sequences ask for room in rank order; behind a refused one nobody later asks, and while a
      running one is refused no waiting one does. So whoever is first gets what becomes free.
    * A running sequence that was refused *and* stands at the end of its room takes the room of the last
      in rank behind it, or gives its own to those before it. A waiting one takes room from lower
      priorities, or from waiting ones behind it. Hence the first in rank is never preempted and always
      progresses, and nobody waits in a circle.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.preemptions = 0
        self._sequences: dict[SequenceKey, SequenceState] = {}
        self._waiting: list[SequenceState] = []
        self._running: list[SequenceState] = []
        self._held: list[SequenceState] = []
        self._arrivals = 0
        self._requests = 0
        self._step = 0
        self._pause_s = inf

    @property
    def running(self) -> int:
        """Sequences that take steps."""
        return len(self._running)

    @property
    def step(self) -> int:
        """Number of the last plan; logs name it."""
        return self._step

    @property
    def waiting(self) -> int:
        """Sequences queued, preempted ones included."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Room that those queued ask for, in all. May be read from another thread."""
        return sum(sequence.length + self.limits.reserve_ahead_tokens for sequence in tuple(self._waiting))

    @property
    def held(self) -> int:
        """Sequences that keep their room and take no steps."""
        return len(self._held)

    def generation(self, key: SequenceKey) -> int:
        """How often the sequence had to begin anew."""
        return self._sequences[key].generation

    def computed_of(self, key: SequenceKey, wanted: Range) -> int:
        """Up to where a range has KV, from its start on; the last step's is certain only after the next."""
        sequence = self._sequences[key]
        return min(wanted[1], end_of_room(((0, sequence.computed), *sequence.ahead), wanted[0]))

    def computed(self, key: SequenceKey) -> int:
        """How much of a sequence has KV, from position 0 on; nothing of an unknown one."""
        sequence = self._sequences.get(key)
        return 0 if sequence is None else sequence.computed

    def split(self, key: SequenceKey, position: int) -> None:
        """A shard of it became two, which touch at `position`."""
        self._sequences[key].split(position)

    def is_asking(self, key: SequenceKey) -> bool:
        """Whether a request for room is on its way."""
        return self._sequences[key].asked is not None

    def freeze(self, key: SequenceKey) -> None:
        """Plan no rows and ask for no room, keeping its place: its KV is moving. Idempotent."""
        self._sequences[key].frozen = True

    def thaw(self, key: SequenceKey) -> None:
        """Go on after `freeze`. Unknown sequences are ignored."""
        if key in self._sequences:
            self._sequences[key].frozen = False

    def submit(
        self,
        key: SequenceKey,
        length: int,
        priority: int,
        deadline_s: float,
        now_s: float,
        *,
        max_length: int,
        room: Sequence[Range] = (),
        computed: Sequence[Range] = (),
    ) -> None:
        """Queue a sequence of `length` known tokens (prompt and outputs so far) that ends by `max_length`.

        `room` are shards it already has and `computed` the committed ranges in them, both from adoption. The
        last known token is always computed (again), so adopt with all tokens but the last. What of them no
        row will see has `expired`.
        Raises AlreadyExists, DeadlineExceeded (over on arrival) and ResourceExhausted (queue full).
        """
        assert 0 < length < max_length <= self.limits.max_sequence_length, (key, length, max_length)
        if key in self._sequences:
            raise AlreadyExists(f"sequence {key} is already scheduled")
        if deadline_s <= now_s:
            raise DeadlineExceeded(f"the deadline of {key} was over when it arrived")
        if len(self._waiting) >= self.limits.max_waiting:
            raise ResourceExhausted(
                f"{self.limits.max_waiting} sequences wait (dense.max_waiting): retry later or elsewhere"
            )
        self._arrivals += 1
        window = self.limits.window_tokens
        sequence = SequenceState(key, priority, self._arrivals, length, max_length, deadline_s, window)
        sequence.give(room)
        sequence.commit(computed)
        self._sequences[key] = sequence
        insort(self._waiting, sequence, key=_rank)

    def plan(self, now_s: float) -> StepPlan:
        """The next step; it replaces an earlier plan that was not applied."""
        self._step += 1
        self._pause_s = inf
        expired = self._expire(now_s)
        preempted, exhausted = self._relieve(now_s)
        room = [*self._ask_running(now_s), *self._admit(now_s)]
        rows = self._rows()
        return StepPlan(self._step, rows, tuple(room), preempted, expired, exhausted)

    def apply(self, plan: StepPlan, sampled: Mapping[SequenceKey, int]) -> None:
        """The step was computed: counters move. `sampled`: tokens appended per sequence whose row samples.

        Rows of sequences that have since finished, been preempted, held or lost KV count for nothing, and
        so does a sampling row without an entry in `sampled`: it is planned again.
        """
        for row in plan.rows:
            sequence = self._sequences.get(row.key)
            if sequence is None or sequence.planned is not row:
                continue
            sequence.planned = None
            tokens = sampled.get(row.key, 0) if row.samples else 0
            if tokens or not row.samples:
                sequence.advance(row.count, tokens)

    def granted(self, request: RoomRequest, ranges: Sequence[Range]) -> bool:
        """Room was reserved: each range is a shard with its whole extent (a grown shard replaces itself).

        May cover less than was asked; the rest is asked for again. False: the request is of an earlier
        life, nothing was taken, free it.
        """
        sequence = self._asker(request)
        if sequence is None:
            return False
        sequence.asked = None
        sequence.give(ranges)
        return True

    def refused(self, request: RoomRequest, now_s: float) -> None:
        """Nobody has room for any of it. Asked for again after a pause, or after a preemption."""
        sequence = self._asker(request)
        if sequence is not None:
            sequence.asked, sequence.refused = None, True
            sequence.retry_s = now_s + self.limits.room_retry_s

    def lost(self, key: SequenceKey, ranges: Sequence[Range]) -> bool:
        """KV and room of `ranges` are gone. The counter falls back to the hole and jumps over what survived.

        Nothing is sampled until it is back at the end. True: it went on past expired tokens that the hole
        needs, so it gave up all its room and begins anew under a higher generation. What no row will see has
        `expired`, and is no hole. Unknown sequences are ignored.
        """
        sequence = self._sequences.get(key)
        if sequence is None or sequence.lose(ranges):
            return False
        self._begin_anew(sequence)
        return True

    def needed_from(self, key: SequenceKey) -> int:
        """The first position that any row still to be computed sees: 0 without windows."""
        return self._sequences[key].needed_from

    def expired_before(self, key: SequenceKey) -> int:
        """What lies before this position has left the sequence's room, and counts as computed."""
        return self._sequences[key].expired

    def expire_before(self, key: SequenceKey, position: int) -> None:
        """Give back room and KV of what lies before `position`, at most `needed_from`; it is no hole."""
        self._sequences[key].expire_before(position)

    def hold(self, key: SequenceKey) -> None:
        """Stop stepping, keep everything (its client's gateway is gone). Unknown sequences are ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None and sequence not in self._held:
            self._leave(sequence)
            self._held.append(sequence)

    def finish(self, key: SequenceKey) -> None:
        """The sequence ends, whatever its state (also cancellation). Unknown sequences are ignored."""
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._leave(sequence)

    def due_s(self) -> float:
        """When to plan again though nothing was submitted or answered: a deadline or a pause ends."""
        return min(self._pause_s, min((s.deadline_s for s in self._sequences.values()), default=inf))

    def _asker(self, request: RoomRequest) -> SequenceState | None:
        sequence = self._sequences.get(request.key)
        return sequence if sequence is not None and sequence.asked == request else None

    def _leave(self, sequence: SequenceState) -> None:
        sequence.planned = None
        for members in (self._running, self._waiting, self._held):
            if sequence in members:
                members.remove(sequence)

    def _expire(self, now_s: float) -> tuple[SequenceKey, ...]:
        expired = tuple(s.key for s in self._sequences.values() if s.deadline_s <= now_s)
        for key in expired:
            self.finish(key)
        return expired

    def _relieve(self, now_s: float) -> tuple[tuple[SequenceKey, ...], tuple[SequenceKey, ...]]:
        """(preempted, exhausted), one at most: the first in rank that cannot go on and can be helped."""
        starved = [s for s in self._running if s.refused and s.starved]
        for stuck in sorted([*starved, *(s for s in self._waiting if s.refused)], key=_rank):
            runs = stuck in starved
            if stuck.asked is not None or stuck.frozen:
                if runs:
                    break
                continue
            if self._is_hopeless(stuck, now_s):
                self.finish(stuck.key)
                return (), (stuck.key,)
            victim = self._victim(stuck, runs) if now_s >= stuck.victim_s else None
            if victim is not None:
                self._preempt(victim, stuck, now_s)
                return (victim.key,), ()
        return (), ()

    def _is_hopeless(self, stuck: SequenceState, now_s: float) -> bool:
        """It comes first, nobody else has room to give, and that for long: the pool is too small."""
        others_hold = any(s.room for s in self._sequences.values() if s is not stuck)
        if others_hold or not self._is_first(stuck):
            stuck.alone_since_s = None
            return False
        if stuck.alone_since_s is None:
            stuck.alone_since_s = now_s
        return now_s - stuck.alone_since_s >= self.limits.room_patience_s

    def _is_first(self, sequence: SequenceState) -> bool:
        """Nobody who runs or waits comes before it."""
        return all(sequence.rank <= members[0].rank for members in (self._running, self._waiting) if members)

    def _victim(self, stuck: SequenceState, runs: bool) -> SequenceState | None:
        """Who gives way: the last in rank that has room; see the class for what a waiting one may take."""
        waiting = (s for s in self._waiting if s.room and s.rank > stuck.rank)
        if not runs:
            lower = (s for s in self._running if s.room and s.priority > stuck.priority)
            return max(chain(lower, waiting), key=_rank, default=None)
        running = (s for s in self._running if s.room and s.rank > stuck.rank)
        return max(chain(running, waiting), key=_rank, default=None if self._is_first(stuck) else stuck)

    def _begin_anew(self, sequence: SequenceState) -> None:
        """It has nothing any more; if it ran, it waits for room."""
        if sequence in self._running:
            self._running.remove(sequence)
            insort(self._waiting, sequence, key=_rank)
        sequence.reset()

    def _preempt(self, victim: SequenceState, winner: SequenceState, now_s: float) -> None:
        self._begin_anew(victim)
        self.preemptions += 1
        if victim is not winner:
            winner.retry_s = now_s
            winner.victim_s = now_s + self.limits.room_retry_s

    def _ask_running(self, now_s: float) -> Iterator[RoomRequest]:
        ahead = self.limits.reserve_ahead_tokens
        for sequence in self._running:
            if sequence.asked is None:
                wanted = sequence.wants(ahead, 2 * ahead)
                if wanted is not None and self._may_ask(sequence, now_s):
                    yield self._ask(sequence, wanted)
            if sequence.refused and sequence.starved:
                return

    def _admit(self, now_s: float) -> Iterator[RoomRequest]:
        """Waiting sequences with room start to run; others ask for it, in rank order, as slots are free."""
        ahead = self.limits.reserve_ahead_tokens
        first_refused = next((s.rank for s in self._running if s.refused), (inf, inf))
        for sequence in self._waiting[: self.limits.max_batch - len(self._running)]:
            if sequence.asked is None and not sequence.frozen:
                wanted = sequence.wants(ahead, ahead)
                if wanted is None:
                    self._waiting.remove(sequence)
                    insort(self._running, sequence, key=_rank)
                elif sequence.rank < first_refused and self._may_ask(sequence, now_s):
                    yield self._ask(sequence, wanted)
            if sequence.refused:
                first_refused = min(first_refused, sequence.rank)

    def _may_ask(self, sequence: SequenceState, now_s: float) -> bool:
        """Not within the pause after a refusal; remembers when the first such pause ends."""
        if not sequence.refused or now_s >= sequence.retry_s:
            return True
        self._pause_s = min(self._pause_s, sequence.retry_s)
        return False

    def _ask(self, sequence: SequenceState, wanted: Range) -> RoomRequest:
        self._requests += 1
        sequence.asked = RoomRequest(sequence.key, sequence.generation, self._requests, *wanted)
        return sequence.asked

    def _rows(self) -> tuple[Row, ...]:
        """Sequences one token short first, a token each; then chunks by rank while the budget lasts."""
        budget = self.limits.step_tokens
        rows: list[Row] = []
        longer: list[SequenceState] = []
        for sequence in self._running:
            sequence.planned = None
            if sequence.length - sequence.computed > 1:
                longer.append(sequence)
            elif (row := sequence.row(1)) is not None:
                rows.append(row)
        budget -= len(rows)
        for sequence in longer:
            if budget == 0:
                break
            if (row := sequence.row(budget)) is not None:
                rows.append(row)
                budget -= row.count
        return tuple(rows)
