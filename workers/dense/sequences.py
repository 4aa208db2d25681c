"""One sequence as its dense worker knows it: tokens, place of its KV, owner, times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import AnabranchError
from cluster.sampling import SamplingParameters
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardId, ShardRef, WorkerId
from workers.dense.deltas import Delta, FinishReason, Handoff, Subscriber, Timings
from workers.dense.prefixes import BlockChain
from workers.dense.sampler import Sampled, SampleRow, TokenHistory

_LIFE_BITS = 16
GENERATION_MOST = (1 << _LIFE_BITS) - 1
"""Highest generation a gateway may give: 65,535 resubmissions of one request."""


def wire_generation(generation: int, life: int) -> Generation:
    """The generation attention workers see, in a uint32: the gateway's, then our count of fresh starts.

    A resubmission (a higher gateway generation) therefore outranks every life of those before it.
    """
    assert 0 < generation <= GENERATION_MOST
    assert 0 <= life <= GENERATION_MOST
    return Generation(generation << _LIFE_BITS | life)


@dataclass(frozen=True, slots=True)
class Placed:
    """A shard of a sequence's map and the wire generation its worker holds it under.

    is_trimmed: the map has it begin later than it did; its worker follows.
    """

    shard: ShardRef
    generation: Generation
    is_trimmed: bool = False

    @property
    def identity(self) -> tuple[WorkerId, Epoch, ShardId]:
        """What stays the same while the shard grows."""
        return self.shard.worker, self.shard.epoch, self.shard.shard

    def grown_to(self, end: int) -> Placed:
        """The same shard with more room."""
        return replace(self, shard=replace(self.shard, end=end))

    def trimmed_before(self, position: int, block_tokens: int) -> Placed:
        """The same shard without its whole blocks before `position`."""
        blocks = max(0, position - self.shard.first) // block_tokens
        if blocks == 0:
            return self
        first = self.shard.first + blocks * block_tokens
        return replace(self, shard=replace(self.shard, first=first), is_trimmed=True)


@dataclass(frozen=True, slots=True)
class Submission:
    """What a gateway submits; times are on this process's monotonic clock."""

    key: SequenceKey
    generation: int
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    sampling: SamplingParameters
    seed: int
    max_tokens: int
    priority: int
    deadline_s: float
    tenant: str
    shard_map: tuple[ShardRef, ...] | None = None

    @property
    def is_resumed(self) -> bool:
        """Whether KV of it may lie somewhere. A map goes out before the first append, so who has neither
        heard a map nor received a token resubmits from nothing.
        """
        return bool(self.output) or bool(self.shard_map)


@dataclass(slots=True)
class Stopwatch:
    """Times of one sequence, in seconds of the monotonic clock; None until it happened."""

    submitted_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    dense_seconds: float = 0.0
    attention_seconds: float = 0.0
    lane_seconds: float = 0.0
    waited_seconds: float = 0.0
    preemptions: int = 0

    def read(self, now_s: float) -> Timings:
        """The times so far."""
        admitted_s = now_s if self.admitted_s is None else self.admitted_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return Timings(
            queue_seconds=admitted_s - self.submitted_s,
            prefill_seconds=first_token_s - admitted_s,
            decode_seconds=now_s - first_token_s,
            dense_seconds=self.dense_seconds,
            attention_seconds=self.attention_seconds,
            lane_seconds=self.lane_seconds,
            waited_seconds=self.waited_seconds,
            preemptions=self.preemptions,
        )


@dataclass(slots=True, eq=False)
class LiveSequence:
    """One sequence between submission and end. Owned by the engine's thread; owner of its shard map.

    Invariant of `shards`: ordered by position and disjoint; between two of them there may be a hole.
    """

    submission: Submission
    subscriber: Subscriber
    stopwatch: Stopwatch
    token_ids: list[int]
    """Prompt and output."""
    chain: BlockChain
    """Identities of its blocks, as far as they were asked for."""
    shards: tuple[Placed, ...] = ()
    life: int = 0
    """Fresh starts under this gateway generation: preemptions, and losses of shards."""
    history: TokenHistory | None = None
    orphaned_s: float | None = None
    """Since when its gateway's stream is gone."""
    has_held: bool = False
    """Whether any reservation ever succeeded."""
    computed_end: int = 0
    """Once it is over: positions before it have KV."""
    moves_failed: int = 0
    cached_tokens: int = 0
    """Of its prompt, found in the pool when it arrived."""
    void: dict[WorkerId, Generation] = field(default_factory=dict)
    """Per worker: what it granted under this wire generation or a lower one was given up."""

    @classmethod
    def of(
        cls, submission: Submission, subscriber: Subscriber, now_s: float, geometry: KvGeometry
    ) -> LiveSequence:
        """A sequence as submitted."""
        penalized = submission.sampling.penalized
        return cls(
            submission,
            subscriber,
            Stopwatch(now_s),
            [*submission.prompt, *submission.output],
            BlockChain(geometry, submission.tenant),
            history=TokenHistory(submission.prompt, submission.output) if penalized else None,
        )

    @property
    def key(self) -> SequenceKey:
        """Its identity."""
        return self.submission.key

    @property
    def output_count(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.submission.prompt)

    @property
    def max_length(self) -> int:
        """Prompt and output together, at the end."""
        return len(self.submission.prompt) + self.submission.max_tokens

    @property
    def is_complete(self) -> bool:
        """Whether it has all the tokens it may have."""
        return self.output_count >= self.submission.max_tokens

    @property
    def is_worn_out(self) -> bool:
        """Whether it began anew more often than wire generations can count."""
        return self.life > GENERATION_MOST

    @property
    def generation(self) -> Generation:
        """The wire generation of what it reserves next; its present shards may be under lower ones."""
        return wire_generation(self.submission.generation, self.life)

    def is_of_submission(self, generation: Generation) -> bool:
        """Whether a wire generation is one of this submission's lives."""
        return generation >> _LIFE_BITS == self.submission.generation

    def sample_row(self) -> SampleRow:
        """What the sampler needs for the next token."""
        submission = self.submission
        return SampleRow(
            submission.sampling, submission.seed, self.key.choice, self.output_count, self.history
        )

    def append(self, token_id: int) -> None:
        """One more output token."""
        self.token_ids.append(token_id)
        if self.history is not None:
            self.history.append(token_id)

    def place(self, granted: Iterable[Placed]) -> None:
        """Room was reserved: new shards, or grown ones in place of themselves."""
        kept = {placed.identity: placed for placed in self.shards}
        for placed in granted:
            known = kept.get(placed.identity)
            kept[placed.identity] = placed if known is None else known.grown_to(placed.shard.end)
        self.shards = tuple(sorted(kept.values(), key=_first_position))
        self.has_held = True
        assert all(
            a.shard.end <= b.shard.first for a, b in zip(self.shards, self.shards[1:], strict=False)
        ), self.shards

    def lose_worker(self, worker: WorkerId) -> tuple[Placed, ...]:
        """Drop the shards on one worker and begin a new life there; returns them."""
        lost = tuple(placed for placed in self.shards if placed.shard.worker == worker)
        if lost:
            self.shards = tuple(placed for placed in self.shards if placed.shard.worker != worker)
            self.void[worker] = lost[0].generation  # a worker knows one generation of a sequence
            self.life += 1
        return lost

    def begin_anew_at(self, worker: WorkerId) -> None:
        """Whatever a worker granted outside the map so far is given up."""
        self.void[worker] = self.generation
        self.life += 1

    def holds_at(self, worker: WorkerId) -> bool:
        """Whether any of its shards lies on a worker."""
        return any(placed.shard.worker == worker for placed in self.shards)

    def exchange(self, old: Placed, *new: Placed) -> None:
        """A shard moved, or its beginning: `new` are the copy and what is left, no longer than `old`."""
        kept = [placed for placed in self.shards if placed is not old]
        self.shards = tuple(sorted([*kept, *new], key=_first_position))

    @property
    def first_kept(self) -> int:
        """Where its map begins."""
        return self.shards[0].shard.first if self.shards else 0

    def drop_before(self, position: int) -> frozenset[WorkerId]:
        """Whole blocks before `position` leave the map; returns the workers whose shards changed."""
        size = self.chain.block_tokens
        after = {
            placed.identity: placed.trimmed_before(position, size)
            for placed in self.shards
            if placed.shard.end > position
        }
        changed = {placed.shard.worker for placed in self.shards if after.get(placed.identity) is not placed}
        self.shards = tuple(after.values())
        return frozenset(changed)

    def is_void(self, placed: Placed) -> bool:
        """Whether a reservation belongs to a life that was given up before its answer came."""
        void = self.void.get(placed.shard.worker)
        return void is not None and placed.generation <= void

    def begin_anew(self) -> None:
        """Everything is given back, under a higher generation."""
        self.shards = ()
        self.life += 1

    def shard_map(self) -> tuple[ShardRef, ...]:
        """The map as gateways know it."""
        return tuple(placed.shard for placed in self.shards)

    def delta(
        self,
        tokens: Sequence[Sampled] = (),
        *,
        with_map: bool = False,
        finish: FinishReason | None = None,
        matched_token_id: int | None = None,
        failure: AnabranchError | None = None,
        timings: Timings | None = None,
        handoff: Handoff | None = None,
    ) -> Delta:
        """News of it; `tokens` are the last of its output."""
        return Delta(
            self.key,
            self.submission.generation,
            self.output_count - len(tokens),
            tuple(tokens),
            self.shard_map() if with_map else None,
            finish,
            matched_token_id,
            failure,
            timings,
            handoff,
            self.cached_tokens,
        )


def _first_position(placed: Placed) -> int:
    return placed.shard.first
