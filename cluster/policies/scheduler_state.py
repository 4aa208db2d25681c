"""What the scheduler says (values) and what it keeps for one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.policies.ranges import Range, end_of_room, first_gap, insert, join, subtract
from cluster.types import SequenceKey


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Every limit of one scheduler.

    `reserve_ahead_tokens`: room asked for beyond the known tokens. `room_retry_s`: pause after a refusal
    before room is asked for again, and between two preemptions for the same sequence. `room_patience_s`:
    how long a sequence is refused with nobody else holding room here before it is exhausted; frees
    are asynchronous and other dense workers share the pool, so one refusal proves nothing.
    """

    step_tokens: int
    max_batch: int
    max_waiting: int
    reserve_ahead_tokens: int
    max_sequence_length: int
    room_retry_s: float = 0.05
    room_patience_s: float = 5.0

    def __post_init__(self) -> None:
        assert 0 < self.max_batch <= self.step_tokens, "each running sequence takes a token of a step"
        assert self.max_waiting > 0
        assert self.reserve_ahead_tokens > 0
        assert self.room_retry_s > 0


@dataclass(frozen=True, slots=True)
class Row:
    """One chunk: `count` tokens of a sequence from position `start`, all within one shard's room.

    `generation` is the number of preemptions so far (the low half of the wire generation). `samples`: the
    chunk ends at the last known token and nothing before it is missing, so its logits give the next one.
    """

    key: SequenceKey
    generation: int
    start: int
    count: int
    samples: bool


@dataclass(frozen=True, slots=True)
class RoomRequest:
    """Positions first..end to reserve next. Answered exactly once, with this value.

    `number` is unique within a scheduler: an answer to a request of an earlier life is recognised.
    """

    key: SequenceKey
    generation: int
    number: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does. The engine frees the room of `preempted` (now under a higher generation) before
    it asks for `room`, ends `expired` with DEADLINE_EXCEEDED and `exhausted` with RESOURCE_EXHAUSTED; the
    latter two have left the scheduler already.
    """

    step: int
    rows: tuple[Row, ...]
    room: tuple[RoomRequest, ...]
    preempted: tuple[SequenceKey, ...]
    expired: tuple[SequenceKey, ...]
    exhausted: tuple[SequenceKey, ...]

    @property
    def tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.count for row in self.rows)


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence's progress; owned by the scheduler.

    Invariant: 0 <= computed < length <= max_length; [0, computed) and the ranges of `ahead` lie in `room`.

        0          computed     ahead[0]        length    room[-1].end   max_length
        |=============|............|======|.........|...............|..........|
          KV is there   hole: next  survived a loss   reserved ahead
    """

    key: SequenceKey
    priority: int
    arrival: int
    length: int
    max_length: int
    deadline_s: float
    generation: int = 0
    computed: int = 0
    ahead: tuple[Range, ...] = ()
    room: tuple[Range, ...] = ()
    asked: RoomRequest | None = None
    planned: Row | None = None
    refused: bool = False
    retry_s: float = 0.0
    victim_s: float = 0.0
    alone_since_s: float | None = None
    frozen: bool = False

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts sequences: lower priority number first, then earlier arrival."""
        return self.priority, self.arrival

    @property
    def starved(self) -> bool:
        """There is no room for the next position."""
        return end_of_room(self.room, self.computed) == self.computed

    def wants(self, enough_tokens: int, goal_tokens: int) -> Range | None:
        """The first positions without room, if less than `enough_tokens` beyond the known ones have it.

        Room at the tail is wanted up to `goal_tokens` beyond, so that not every token asks again.
        """
        if self.frozen:
            return None
        enough = min(self.length + enough_tokens, self.max_length)
        gap = first_gap(self.room, self.computed, enough)
        if gap is None or gap[1] < enough:
            return gap
        return gap[0], max(enough, min(self.length + goal_tokens, self.max_length))

    def row(self, budget_tokens: int) -> Row | None:
        """The next chunk within budget, one shard's room and the next hole; remembered as planned."""
        start = self.computed
        if self.frozen:
            return None
        end = min(self.length, start + budget_tokens, end_of_room(self.room, start))
        if self.ahead:
            end = min(end, self.ahead[0][0])
        if end <= start:
            return None
        self.planned = Row(self.key, self.generation, start, end - start, end == self.length)
        return self.planned

    def advance(self, count: int, sampled: int) -> None:
        """`count` more tokens have KV, `sampled` more are known; jumps over what survived a loss."""
        self.computed += count
        self.length += sampled
        assert self.length <= self.max_length, (self.key, self.length)
        if self.ahead and self.computed == self.ahead[0][0]:
            self.computed, self.ahead = self.ahead[0][1], self.ahead[1:]
        assert self.computed < self.length

    def commit(self, ranges: Sequence[Range]) -> None:
        """KV is at exactly `ranges`. The last known token is always run again: its logits are needed."""
        present = join((first, min(end, self.length - 1)) for first, end in ranges if first < self.length - 1)
        at_start = bool(present) and present[0][0] == 0
        self.computed = present[0][1] if at_start else 0
        self.ahead = present[1:] if at_start else present

    def give(self, ranges: Sequence[Range]) -> None:
        """Room was granted: shards with their whole ranges."""
        for added in ranges:
            self.room = insert(self.room, added)
        self.refused, self.alone_since_s = False, None

    def lose(self, ranges: Sequence[Range]) -> None:
        """The KV and the room of `ranges` are gone; a chunk under way counts for nothing."""
        committed = subtract(((0, self.computed), *self.ahead), ranges)
        self.room = subtract(self.room, ranges)
        self.planned = None
        self.commit(committed)

    def reset(self) -> None:
        """Preemption: a new generation that has nothing."""
        self.generation += 1
        self.computed, self.ahead, self.room = 0, (), ()
        self.asked = self.planned = None
