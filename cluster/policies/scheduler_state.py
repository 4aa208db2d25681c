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
    are asynchronous and other dense workers share the pool, so one refusal proves nothing. `window_tokens`:
    the row at p sees p - window_tokens + 1 .. p and nothing before, in every layer; None: it sees all.
    """

    step_tokens: int
    max_batch: int
    max_waiting: int
    reserve_ahead_tokens: int
    max_sequence_length: int
    room_retry_s: float = 0.05
    room_patience_s: float = 5.0
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        assert 0 < self.max_batch <= self.step_tokens, "each running sequence takes a token of a step"
        assert self.max_waiting > 0
        assert self.reserve_ahead_tokens > 0
        assert self.room_retry_s > 0
        assert self.window_tokens is None or self.window_tokens > 0


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

    Invariant: 0 <= expired <= computed < length <= max_length; [expired, computed) and the ranges of `ahead`
    lie in `room`, which has nothing before `expired`; no row still to be computed sees anything there.

        0     expired      computed     ahead[0]        length    room[-1].end   max_length
        |---------|===========|............|======|.........|...............|..........|
       out of window  KV is there  hole: next  survived a loss  reserved ahead
    """

    key: SequenceKey
    priority: int
    arrival: int
    length: int
    max_length: int
    deadline_s: float
    window_tokens: int | None = None
    generation: int = 0
    expired: int = 0
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

    @property
    def needed_from(self) -> int:
        """The first position that a row still to be computed sees."""
        return self._seen_from(self.computed)

    def wants(self, enough_tokens: int, goal_tokens: int) -> Range | None:
        """The first positions without room, if less than `enough_tokens` beyond the known ones have it.

        Room at the tail is wanted up to `goal_tokens` beyond, so that not every token asks again.
        """
        if self.frozen:
            return None
        enough = min(self.length + enough_tokens, self.max_length)
        if first_gap(self.room, self.computed, enough) is None:
            return None
        goal = max(enough, min(self.length + goal_tokens, self.max_length))
        return first_gap(self.room, self.computed, goal)  # up to what has room already, ahead of a loss

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
        """KV is at exactly `ranges`. The last known token is always run again: its logits are needed.

        The counter goes to the end of the last range from which one can go on; without one, to 0. What lies
        before that range is out of every window: missing there is no hole, and what is there has expired.
        """
        present = join((first, min(end, self.length - 1)) for first, end in ranges if first < self.length - 1)
        usable = [index for index, (first, end) in enumerate(present) if first <= self._seen_from(end)]
        self.expired, self.computed, self.ahead = 0, 0, present
        if usable:
            (self.expired, self.computed), self.ahead = present[usable[-1]], present[usable[-1] + 1 :]
        self.room = subtract(self.room, [(0, self.expired)])

    def give(self, ranges: Sequence[Range]) -> None:
        """Room was granted: shards with their whole ranges, as their workers know them."""
        for first, end in ranges:
            if end > self.expired:
                self.room = insert(self.room, (max(first, self.expired), end))
        self.refused, self.alone_since_s = False, None

    def split(self, position: int) -> None:
        """Room on both sides of a position is of two shards from now on."""
        self.room = tuple(
            piece
            for first, end in self.room
            for piece in ((first, min(end, position)), (max(first, position), end))
            if piece[0] < piece[1]
        )

    def expire_before(self, position: int) -> None:
        """KV and room of what lies before `position`, which no row sees any more, are given back."""
        assert self.expired <= position <= self.needed_from, (self.key, position, self.needed_from)
        self.expired = position
        self.room = subtract(self.room, [(0, position)])

    def lose(self, ranges: Sequence[Range]) -> bool:
        """The KV and the room of `ranges` are gone; a chunk under way counts for nothing.

        False: a hole sees what has expired. Then nothing of what is left is of use: everything depends on
        all before it, so computing begins at 0.
        """
        committed = subtract(((self.expired, self.computed), *self.ahead), ranges)
        had_expired = self.expired > 0
        self.room = subtract(self.room, ranges)
        self.planned = None
        self.commit(committed)
        return self.expired > 0 or not had_expired

    def reset(self) -> None:
        """A new generation that has nothing."""
        self.generation += 1
        self.expired, self.computed, self.ahead, self.room = 0, 0, (), ()
        self.asked = self.planned = None

    def _seen_from(self, position: int) -> int:
        """The first position that the row at `position` sees."""
        return 0 if self.window_tokens is None else max(0, position - self.window_tokens + 1)
