"""Prefixes that lie in the pool already: where a dense worker saw them last, and where to go on. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.blocks import BlockHash
from cluster.policies.directory import Life, Run
from cluster.types import Epoch, ShardRef, WorkerId

_ENTRIES_MOST = 131_072
"""Blocks remembered: four million tokens in blocks of 32."""


class Chain(Protocol):
    """The identities of one sequence's full blocks."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        ...

    @property
    def hashes(self) -> Sequence[BlockHash]:
        """In order, as far as they are known."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A life of a worker that may hold the blocks of positions first..end of a sequence."""

    worker: WorkerId
    epoch: Epoch
    first: int
    end: int


Find = Callable[[Sequence[BlockHash], int], tuple[Run, ...]]
"""Where the longest run of consecutive blocks may lie, before which so many come; may block for a moment."""


def blocks_known(sources: Sequence[Source], block_tokens: int) -> int:
    """How many whole blocks from position 0 on these sources cover."""
    return sources[-1].end // block_tokens if sources else 0


def go_on(
    sources: Sequence[Source],
    runs: Iterable[Run],
    block_tokens: int,
    leads_to: Callable[[WorkerId, Epoch], bool],
    turn: int = 0,
) -> tuple[Source, ...]:
    """These sources, and behind their last whole block those runs, as far as a lane leads there. Of several
    holders the one of the blocks before is best, because it makes one shard of both; otherwise they take
    turns, so that what is read at all of them is about the same.
    """
    found = list(sources)
    position = blocks_known(sources, block_tokens) * block_tokens
    for run in runs:
        usable = [life for life in run.holders if leads_to(*life)]
        if not usable:
            break
        before = Life(found[-1].worker, found[-1].epoch) if found else None
        end = position + run.blocks * block_tokens
        _join(found, before if before in usable else usable[turn % len(usable)], position, end)
        position = end
    return tuple(found)


def _join(found: list[Source], life: tuple[WorkerId, Epoch], first: int, end: int) -> None:
    """Add a source, as part of the one before it where that is the same life."""
    if found and (found[-1].worker, found[-1].epoch) == life:
        first = found.pop().first
    found.append(Source(*life, first, end))


def sources_of(shards: Iterable[ShardRef]) -> tuple[Source, ...]:
    """The shards of a sequence with the same prefix, as sources."""
    return tuple(Source(shard.worker, shard.epoch, shard.first, shard.end) for shard in shards)


class PrefixIndex:
    """Identity -> the life of a worker that held the block. A hint: the worker's own answer counts.

    Bounded; what was neither seen nor asked for longest is forgotten first.
    """

    def __init__(self) -> None:
        self._holders: OrderedDict[BlockHash, tuple[WorkerId, Epoch]] = OrderedDict()

    def remember(self, chain: Chain, shards: Iterable[ShardRef]) -> None:
        """A sequence's KV lies in these shards; blocks cut by a shard's edge are nobody's."""
        size = chain.block_tokens
        for shard in shards:
            whole = range(-(-shard.first // size), min(shard.end // size, len(chain.hashes)))
            for index in whole:
                self._holders[chain.hashes[index]] = (shard.worker, shard.epoch)
                self._holders.move_to_end(chain.hashes[index])
        while len(self._holders) > _ENTRIES_MOST:
            self._holders.popitem(last=False)

    def sources(self, chain: Chain, leads_to: Callable[[WorkerId, Epoch], bool]) -> tuple[Source, ...]:
        """Where the longest known run of a sequence's whole blocks lies, from position 0 on. Forgets lives
        that no lane leads to.
        """
        size = chain.block_tokens
        found: list[Source] = []
        for index, identity in enumerate(chain.hashes):
            holder = self._holders.get(identity)
            if holder is None:
                break
            if not leads_to(*holder):
                del self._holders[identity]
                break
            self._holders.move_to_end(identity)
            _join(found, holder, index * size, (index + 1) * size)
        return tuple(found)
