"""Which attention worker gets which positions of a sequence. Pure; reservations are what is certain.

Free space as reported is stale by design: an allotment is a proposal, the worker's reservation the guard
(DistKV-LLM's `try_move_kvcache` makes the same promise, arXiv 2401.02669).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.types import Epoch, ShardRef, WorkerId


@dataclass(frozen=True, slots=True)
class WorkerSpace:
    """What one arena's worker last said of itself. `load` breaks ties: 0 idle, 1 busy. One that is not at
    `is_home` belongs to another instance, and lends. `tier`: of its process's arenas, 0 the best.
    """

    worker: WorkerId
    epoch: Epoch
    free_tokens: int
    capacity_tokens: int
    load: float = 0.0
    is_local: bool = False
    is_home: bool = True
    tier: int = 0


@dataclass(frozen=True, slots=True)
class Allotment:
    """Positions first..end to reserve at one life of one worker: a new shard, or growth of the one before."""

    worker: WorkerId
    epoch: Epoch
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """`shard_tokens`: a sequence goes on to another worker after this many, rounded up to whole blocks."""

    block_tokens: int
    shard_tokens: int
    max_shards: int

    def __post_init__(self) -> None:
        assert min(self.block_tokens, self.shard_tokens, self.max_shards) > 0

    def whole_blocks(self, tokens: int) -> int:
        """`tokens` rounded up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens


def place(
    first: int,
    end: int,
    shards: Sequence[ShardRef],
    workers: Sequence[WorkerSpace],
    policy: PlacementPolicy,
) -> tuple[Allotment, ...]:
    """Room for positions first..end of a sequence that has `shards`; empty when nothing fits.

    The allotments are in order, touch, and cover exactly first..end, each as much as its worker reports
    free. A local worker is filled first, then those at home, and of each the better tiers; the rest
    overflows. Otherwise the shard before `first` grows to `shard_tokens`, and then the worker follows that
    holds fewest shards of this sequence and, among those, has most space. Of the shards left one is kept for
    each worker with space (half of all shards at most), so that a sequence may grow until every worker is
    full. When that is too many, the largest spaces are filled whole.
    """
    assert 0 <= first < end
    shards_left = policy.max_shards - len(shards)
    stride = policy.whole_blocks(max(policy.shard_tokens, _spread(end - first, shards_left)))
    spread = _Cover(first, shards, workers, policy.block_tokens)
    if spread.extend(end, stride, _spreading):
        kept = min(spread.workers_left(), policy.max_shards // 2)
        if spread.new_shards + kept <= shards_left:
            return tuple(spread.allotments)
    compact = _Cover(first, shards, workers, policy.block_tokens)
    fits = compact.extend(end, policy.whole_blocks(end), _compacting) and compact.new_shards <= shards_left
    return tuple(compact.allotments) if fits else ()


def inadmissible(tokens: int, workers: Sequence[WorkerSpace], policy: PlacementPolicy) -> str | None:
    """Why a sequence of `tokens` tokens can never fit these workers, even empty ones; None if it can."""
    largest = sorted((w.capacity_tokens for w in workers), reverse=True)[: policy.max_shards]
    if policy.whole_blocks(tokens) <= sum(largest):
        return None
    holders = "1 arena holds" if len(largest) == 1 else f"{len(largest)} arenas hold"
    return (
        f"the sequence may take {tokens} tokens of KV cache, prompt and max_tokens together; {holders} "
        f"{sum(largest)} in all: shorten the prompt, lower max_tokens, or give the cluster more attention "
        "workers or larger arenas"
    )


def _spread(tokens: int, shards_left: int) -> int:
    """Tokens a shard must take so that half of the shards left stay free for growth."""
    return -(-2 * tokens // max(1, shards_left))


@dataclass(slots=True)
class _Space:
    """A worker while a cover is built: blocks left, room left in the last block of the open shard."""

    space: WorkerSpace
    free_tokens: int
    shards: int


_Preference = Callable[[_Space], tuple[object, ...]]


def _spreading(item: _Space) -> tuple[object, ...]:
    space = item.space
    kind = (not space.is_local, not space.is_home, space.tier)
    return *kind, item.shards, -item.free_tokens, space.load, space.worker


def _compacting(item: _Space) -> tuple[object, ...]:
    return -item.free_tokens, item.space.load, item.space.worker


@dataclass(slots=True)
class _Cover:
    """Allotments under construction. Invariant: they cover first..position, none more than is free."""

    position: int
    shards: Sequence[ShardRef]
    workers: Sequence[WorkerSpace]
    block_tokens: int
    allotments: list[Allotment] = field(default_factory=list)
    new_shards: int = 0
    spaces: dict[tuple[WorkerId, Epoch], _Space] = field(init=False)
    tail: _Space | None = field(init=False)
    tail_first: int = field(init=False)

    def __post_init__(self) -> None:
        held = Counter((shard.worker, shard.epoch) for shard in self.shards)
        self.spaces = {}
        for space in self.workers:
            life = (space.worker, space.epoch)
            whole_tokens = space.free_tokens // self.block_tokens * self.block_tokens
            self.spaces[life] = _Space(space, whole_tokens, held[life])
        before = next((shard for shard in self.shards if shard.end == self.position), None)
        self.tail = self.spaces.get((before.worker, before.epoch)) if before else None
        self.tail_first = before.first if before else self.position

    def extend(self, end: int, stride_tokens: int, prefer: _Preference) -> bool:
        """Cover up to `end`; False when the workers are full before."""
        while self.position < end:
            if self._tail_room(stride_tokens) == 0 and not self._open(prefer):
                return False
            self._take(min(end - self.position, self._tail_room(stride_tokens)))
        return True

    def workers_left(self) -> int:
        """Workers beside the tail's that could take another shard."""
        spaces = self.spaces.values()
        return sum(item.free_tokens >= self.block_tokens for item in spaces if item is not self.tail)

    def _slack(self) -> int:
        """Tokens the open shard's last block still takes."""
        return -(self.position - self.tail_first) % self.block_tokens

    def _tail_room(self, stride_tokens: int) -> int:
        if self.tail is None:
            return 0
        free = self._slack() + self.tail.free_tokens
        left = max(stride_tokens - (self.position - self.tail_first), self._slack())
        return free if self.tail.space.is_local else min(free, left)

    def _open(self, prefer: _Preference) -> bool:
        """The next worker follows; the same one again just grows its shard by another stride."""
        candidates = [item for item in self.spaces.values() if item.free_tokens >= self.block_tokens]
        if not candidates:
            return False
        chosen = min(candidates, key=prefer)
        if chosen is not self.tail:
            self.new_shards += 1
            chosen.shards += 1
        self.tail, self.tail_first = chosen, self.position
        return True

    def _take(self, tokens: int) -> None:
        assert self.tail is not None
        fresh = max(0, tokens - self._slack())
        self.tail.free_tokens -= -(-fresh // self.block_tokens) * self.block_tokens
        assert self.tail.free_tokens >= 0
        space = self.tail.space
        last = self.allotments[-1] if self.allotments else None
        first = self.position
        if last is not None and (last.worker, last.epoch) == (space.worker, space.epoch):
            first = self.allotments.pop().first
        self.position += tokens
        self.allotments.append(Allotment(space.worker, space.epoch, first, self.position))
