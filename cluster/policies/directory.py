"""What lies where in the pool, as attention workers reported it. Pure: no clock, no I/O, no thread.

A mirror of facts that the workers own, some hundred milliseconds old: whoever acts on it asks the worker,
whose answer counts (Infinite-LLM's request placement map, arXiv 2401.02669, is stale by design as well).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.blocks import BlockHash
from cluster.types import Epoch, SequenceKey, WorkerId

CHANGES_MOST = 262_144
"""Changed blocks kept for whoever copies them, beyond as many as there are: names of what is gone."""


class Life(NamedTuple):
    """One life of an attention worker."""

    worker: WorkerId
    epoch: Epoch


class HeldBlock(NamedTuple):
    """A block, the length of the prefix it ends in blocks, and the lives that hold it: none if it is gone."""

    identity: BlockHash
    prefix_blocks: int
    holders: tuple[Life, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What changed at one life of a worker since its last report; `number` counts its reports.

    starts_over: nothing said before holds.
    """

    life: Life
    number: int
    starts_over: bool = False
    published: Sequence[tuple[BlockHash, int]] = ()
    """Identities that may be shared, each with the blocks of the prefix it ends."""
    withdrawn: Sequence[BlockHash] = ()
    sequences: Sequence[tuple[SequenceKey, int]] = ()
    """Blocks held by sequences; 0 by one that is gone."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive blocks of a prefix that lie at the same workers."""

    blocks: int
    holders: tuple[Life, ...]


def runs_of(blocks: Iterable[HeldBlock], blocks_before: int = 0) -> tuple[Run, ...]:
    """Consecutive blocks of a sequence, from the first on, as runs; one that has another length than its
    place gives it ends them.
    """
    runs: list[Run] = []
    for length, block in enumerate(blocks, blocks_before + 1):
        if block.prefix_blocks != length:
            break
        if runs and runs[-1].holders == block.holders:
            runs[-1] = Run(runs[-1].blocks + 1, block.holders)
        else:
            runs.append(Run(1, block.holders))
    return tuple(runs)


@dataclass(slots=True)
class _Known:
    """What one life said, or is said to hold."""

    alone: tuple[Life]
    """The holders of a block that only it holds: one value for all of them."""
    number: int | None
    """Of its last report; None where it has made none here, and all is from a copy."""
    prefix_blocks: dict[BlockHash, int] = field(default_factory=dict)
    sequences: dict[SequenceKey, int] = field(default_factory=dict)
    blocks: int = 0
    """Of all sequences together; those they share count for each."""


class Directory:
    """Identity -> the lives that hold the block; sequence -> blocks held at each life.

    Bounded by what the workers' arenas hold. Invariant: a life is among an identity's holders exactly if that
    life's last word was that it publishes it, or if it has not said anything yet and a copy says so.

    Who keeps a copy follows: from then on, identities of which the holders change are noted, by name, and
    told as they stand when they are taken.
    """

    def __init__(self, changes_most: int = CHANGES_MOST) -> None:
        self._lives: dict[Life, _Known] = {}
        self._holders: dict[BlockHash, tuple[Life, ...]] = {}
        self._changes_most = changes_most
        self._changed: dict[BlockHash, None] = {}
        self.is_followed = False
        """Whether changes are noted; no longer where there came too many: then the copy has to begin anew."""

    def __len__(self) -> int:
        """Identities known."""
        return len(self._holders)

    def apply(self, report: Report) -> bool:
        """Take a report; False where one before it is missing: the next must start over. One that was taken
        already, because its answer was lost, changes nothing.
        """
        known = self._lives.get(report.life)
        if known is not None and report.number == known.number:
            return True
        if report.starts_over:
            self.forget(report.life)
            known = self._lives[report.life] = _Known((report.life,), report.number)
        elif known is None or known.number is None or report.number != known.number + 1:
            return False
        known.number = report.number
        self._withdraw(known, report.withdrawn)
        self._publish(known, report.published)
        for key, blocks in report.sequences:
            known.blocks += blocks - known.sequences.pop(key, 0)
            if blocks:
                known.sequences[key] = blocks
        return True

    def forget(self, life: Life) -> None:
        """A life is over, and what it held with it."""
        known = self._lives.pop(life, None)
        if known is not None:
            self._withdraw(known, tuple(known.prefix_blocks))

    def retain(self, is_living: Callable[[Life], bool]) -> None:
        """Forget every life that is over."""
        for life in [life for life in self._lives if not is_living(life)]:
            self.forget(life)

    def find(self, identities: Iterable[BlockHash], blocks_before: int = 0) -> tuple[Run, ...]:
        """Where the longest run of a sequence's consecutive blocks lies, from the first on, which has
        `blocks_before` before it. Identity and length are both compared.
        """
        return runs_of(itertools.takewhile(_is_held, map(self._block, identities)), blocks_before)

    def follow(self, *, from_nothing: bool) -> None:
        """Note changes from now on; `from_nothing`: for a copy that is empty, so that all there is counts."""
        self.is_followed = True
        self._changed = dict.fromkeys(self._holders) if from_nothing else {}

    def unfollow(self) -> None:
        """Note no changes any more: the copy is out of reach."""
        self.is_followed = False
        self._changed = {}

    def take_changed(self, most: int) -> list[HeldBlock]:
        """Blocks that changed and were not taken since, as they stand now; the earliest `most` of them."""
        taken = list(itertools.islice(self._changed, most))
        for identity in taken:
            del self._changed[identity]
        return [self._block(identity) for identity in taken]

    def restore(self, blocks: Iterable[HeldBlock], is_living: Callable[[Life], bool]) -> None:
        """Take from a copy what lives hold that have not reported here yet. What it says of others, and of
        lives that are over, is a difference: it counts as changed.
        """
        for block in blocks:
            for life in block.holders:
                known = self._lives.get(life)
                if known is None and is_living(life):
                    known = self._lives[life] = _Known((life,), number=None)
                if known is not None and known.number is None:
                    self._publish(known, [block[:2]])
            if self._block(block.identity) == block:
                self._changed.pop(block.identity, None)
            else:
                self._note(block.identity)

    def sequences_at(self, life: Life) -> Mapping[SequenceKey, int]:
        """The request placement map of one life: blocks held by each sequence."""
        known = self._lives.get(life)
        return dict(known.sequences) if known is not None else {}

    def blocks_at(self, life: Life) -> int:
        """Blocks held by all sequences at one life; those they share count for each."""
        known = self._lives.get(life)
        return known.blocks if known is not None else 0

    def _publish(self, known: _Known, published: Iterable[tuple[BlockHash, int]]) -> None:
        for identity, prefix_blocks in published:
            if identity not in known.prefix_blocks:
                others = self._holders.get(identity)
                self._holders[identity] = (*others, *known.alone) if others else known.alone
                self._note(identity)
            known.prefix_blocks[identity] = prefix_blocks

    def _withdraw(self, known: _Known, withdrawn: Iterable[BlockHash]) -> None:
        for identity in withdrawn:
            if known.prefix_blocks.pop(identity, None) is None:
                continue
            left = tuple(life for life in self._holders[identity] if life is not known.alone[0])
            if not left:
                del self._holders[identity]
            else:
                self._holders[identity] = self._lives[left[0]].alone if len(left) == 1 else left
            self._note(identity)

    def _note(self, identity: BlockHash) -> None:
        if self.is_followed:
            self._changed[identity] = None
            if len(self._changed) > len(self._holders) + self._changes_most:
                self.unfollow()

    def _block(self, identity: BlockHash) -> HeldBlock:
        """As it stands."""
        holders = self._holders.get(identity, ())
        length = self._lives[holders[0]].prefix_blocks[identity] if holders else 0
        return HeldBlock(identity, length, holders)


def _is_held(block: HeldBlock) -> bool:
    return bool(block.holders)
