"""Prefixes that simulated requests share: identities of their blocks, arenas that keep them, the directory.

Identities are chained and looked up by the project's own code (`cluster.blocks`, `cluster.policies`); only
arenas are modelled: they count references and give up what nobody refers to, longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster import blocks
from cluster.blocks import BlockHash
from cluster.policies.directory import Directory, Life, Report, Run
from cluster.types import Epoch, WorkerId
from loadgen.prompts import TokenSource
from loadgen.simulation.timeline import Timeline
from loadgen.workload import Origin, Segment, Session

EPOCH = Epoch(1)
"""Nobody dies in a simulation: every worker has one life."""

_VOCABULARY = 2**16
"""Of contents that are only compared."""


@dataclass(frozen=True, slots=True)
class KnownChain:
    """The identities of a prompt's full blocks (`cluster.policies.prefixes.Chain`), as far as they may be
    those of others. `is_asked_for`: the directory is asked, which does not know that nobody has them.
    """

    block_tokens: int
    hashes: Sequence[BlockHash] = ()
    is_asked_for: bool = False


class Contents:
    """Says what is in prompts, as far as others may begin with the same."""

    def __init__(self, block_tokens: int) -> None:
        self._source = TokenSource(0, _VOCABULARY)
        self._block_tokens = block_tokens

    def chain(self, session: Session, turn: int) -> KnownChain:
        """Of the prompt of a turn, without its last token; no identities where it shares nothing."""
        segments = [s for earlier in session.turns[: turn + 1] for s in earlier.segments]
        if len(session.turns) == 1 and all(segment.origin is Origin.OWN for segment in segments):
            prompt_tokens = sum(segment.tokens for segment in segments)
            return KnownChain(self._block_tokens, is_asked_for=prompt_tokens > self._block_tokens)
        tokens: list[int] = []
        for number, each in enumerate(session.turns[: turn + 1]):
            tokens += self._source.write(each.segments)
            if number < turn:
                answer = Segment(Origin.ANSWER, 1000 * session.index + number, each.output_tokens)
                tokens += self._source.write([answer])
        root = BlockHash(hashlib.sha256(session.tenant.encode()).digest())
        hashes = blocks.chain(root, tokens[:-1], self._block_tokens)
        return KnownChain(self._block_tokens, hashes, is_asked_for=bool(hashes))


@dataclass(slots=True)
class SharedBlocks:
    """Published blocks of one arena. Invariant: an identity is referred to, or cached, or not here."""

    referrers: dict[BlockHash, int] = field(default_factory=dict)
    cached: OrderedDict[BlockHash, None] = field(default_factory=OrderedDict)
    changed: dict[BlockHash, int] = field(default_factory=dict)
    """Identities to tell the directory of, and the blocks of the prefix each ends."""

    def publish(self, identity: BlockHash, prefix_blocks: int) -> int:
        """A private block is sealed; how many more can be had by it: one where an older one is in use."""
        uses = self.referrers.get(identity, 0)
        self.referrers[identity] = uses + 1
        if identity in self.cached:
            del self.cached[identity]
        elif not uses:
            self.changed[identity] = prefix_blocks
        return int(uses > 0)

    def pin(self, identities: Iterable[BlockHash]) -> tuple[list[BlockHash], int]:
        """The longest run that lies here, each with one referrer more; how many of it were only cached."""
        found, woken = [], 0
        for identity in identities:
            if identity not in self.referrers and identity not in self.cached:
                break
            if identity in self.cached:
                del self.cached[identity]
                woken += 1
            self.referrers[identity] = self.referrers.get(identity, 0) + 1
            found.append(identity)
        return found, woken

    def drop(self, identities: Sequence[BlockHash]) -> int:
        """One referrer of each is gone; how many are only cached now, the end of a chain first."""
        freed = 0
        for identity in reversed(identities):
            self.referrers[identity] -= 1
            if not self.referrers[identity]:
                del self.referrers[identity]
                self.cached[identity] = None
                freed += 1
        return freed

    def keep_at_most(self, blocks_free: int) -> None:
        """Give up cached blocks that room was needed for."""
        while len(self.cached) > blocks_free:
            identity, _ = self.cached.popitem(last=False)
            self.changed[identity] = 0


class ReportedDirectory:
    """The controller's directory, told a heartbeat late of what changed at the arenas."""

    def __init__(self, timeline: Timeline, heartbeat_s: float) -> None:
        self._directory = Directory()
        self._timeline = timeline
        self._heartbeat_s = heartbeat_s
        self._numbers: dict[WorkerId, int] = {}
        self._due: set[WorkerId] = set()

    def find(self, identities: Sequence[BlockHash], blocks_before: int) -> tuple[Run, ...]:
        """See `Directory.find`: as far as it was told."""
        return self._directory.find(identities, blocks_before)

    def expect(self, worker: WorkerId, shared: SharedBlocks) -> None:
        """Something may have changed at an arena: it says so with its next heartbeat."""
        if shared.changed and worker not in self._due:
            self._due.add(worker)
            moment_s = self._timeline.now_s + self._heartbeat_s
            self._timeline.at(moment_s, lambda: self._tell(worker, shared))

    def _tell(self, worker: WorkerId, shared: SharedBlocks) -> None:
        self._due.discard(worker)
        self._numbers[worker] = self._numbers.get(worker, 0) + 1
        published = [(identity, length) for identity, length in shared.changed.items() if length]
        withdrawn = [identity for identity, length in shared.changed.items() if not length]
        shared.changed = {}
        number = self._numbers[worker]
        report = Report(Life(worker, EPOCH), number, number == 1, published, withdrawn)
        assert self._directory.apply(report), "every report arrives"
