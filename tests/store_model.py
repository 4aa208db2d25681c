"""A store's rules as dictionaries: who holds what, who is fenced, what is certain, how a call fails."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.clock import ManualClock
from cluster.errors import AnabranchError, Fenced, InvalidRequest, ResourceExhausted, Unavailable
from tests.attention_builders import LEASE_MS
from workers.attention.prepared_step import PreparedStep
from workers.attention.shard_blocks import BlockAccount
from workers.lanes.messages import PlanRow

BLOCKS, BLOCK_TOKENS, LAYERS = 9, 3, 2
LEASE_S = LEASE_MS / 1000


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass
class Chunk:
    """What a step writes at one shard."""

    start: int
    tokens: list[int]
    step: Step


@dataclass
class Part:
    """A shard: its range, its certain tokens, and each position's numbers by layer as last written."""

    name: str
    first: int
    end: int
    tokens: list[int] = field(default_factory=list)
    pending: Chunk | None = None
    numbers: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def committed(self) -> int:
        """One past the last certain position."""
        return self.first + len(self.tokens)

    @property
    def blocks(self) -> int:
        """Blocks reserved."""
        return blocks_for(self.end - self.first)


@dataclass
class Step:
    """A prepared step, the shards it named under which life, and how many layers it wrote."""

    lives: dict[int, int]
    chunks: dict[int, Chunk] = field(default_factory=dict)
    prepared: PreparedStep | None = None
    layers: int = 0
    superseded: bool = False


@dataclass
class StoreModel:
    """What a store of `BLOCKS` blocks should be after the same calls."""

    clock: ManualClock
    ended: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The highest life that is over, and until when that counts, by sequence."""
    life: dict[str, int] = field(default_factory=dict)
    """The life that holds shards, by sequence."""
    lease: dict[str, float] = field(default_factory=dict)
    """When it ends."""
    parts: dict[int, Part] = field(default_factory=dict)
    """The shards, by id."""
    draining: bool = False

    def free(self) -> int:
        """Blocks nobody has."""
        return BLOCKS - sum(part.blocks for part in self.parts.values())

    def of(self, name: str) -> dict[int, Part]:
        """A sequence's shards."""
        return {shard: part for shard, part in self.parts.items() if part.name == name}

    def alive(self, name: str) -> int:
        """The life that may speak."""
        return self.life.get(name, max(0, self.dead(name)) + 1)

    def dead(self, name: str) -> int:
        """The highest life that is over, as far as it is remembered: for two leases."""
        life, end_s = self.ended.get(name, (-1, 0.0))
        return life if self.clock() < end_s else -1

    def renew_lease(self, name: str) -> None:
        """Its owner spoke."""
        self.lease[name] = self.clock() + LEASE_S

    def drop(self, name: str) -> None:
        """All of a sequence is gone."""
        for shard in self.of(name):
            del self.parts[shard]
        self.life.pop(name, None)
        self.lease.pop(name, None)

    def fence(self, name: str, life: int) -> None:
        """This life and all before it are over."""
        self.ended[name] = max(life, self.dead(name)), self.clock() + 2 * LEASE_S

    def is_fenced(self, name: str, life: int) -> bool:
        """Whether this life may neither begin nor take over."""
        return life < self.life.get(name, 0) or life <= self.dead(name)

    def reserve_error(self, name: str, life: int, first: int, end: int) -> type[AnabranchError] | None:
        """How a reservation fails."""
        own = self.of(name)
        if self.is_fenced(name, life):
            return Fenced
        if self.life.get(name) != life:
            room = self.free() + sum(part.blocks for part in own.values())
            return Unavailable if self.draining else self.shortage(blocks_for(end - first), room)
        if any(part.first < end and first < part.end for part in own.values()):
            return InvalidRequest
        grown = [part for part in own.values() if part.end == first]
        more = blocks_for(end - grown[0].first) - grown[0].blocks if grown else blocks_for(end - first)
        return self.shortage(more, self.free())

    def shortage(self, blocks: int, room: int) -> type[AnabranchError] | None:
        """Whether so many blocks are too many."""
        return ResourceExhausted if blocks > room else None

    def truncate(self, name: str, tokens: list[int]) -> None:
        """min(committed, common prefix) of each shard; nothing after a token that differs."""
        parts = sorted(self.of(name).items(), key=lambda item: item[1].first)
        held = {part.first + i: token for _, part in parts for i, token in enumerate(part.tokens)}
        wrong = [
            position
            for position, token in held.items()
            if position < len(tokens) and tokens[position] != token
        ]
        end = min([len(tokens), *wrong])
        for shard, part in parts:
            part.pending = None
            part.tokens = part.tokens[: max(0, end - part.first)]
            if not part.tokens:
                del self.parts[shard]

    def may_trim(self, name: str, life: int, keep_from: int) -> bool:
        """Whether this life may give up what lies before a position."""
        if life < self.life.get(name, self.dead(name)):
            return False
        cut = [part for part in self.of(name).values() if keep_from < part.end]
        return self.life.get(name) != life or all(keep_from <= part.committed for part in cut)

    def trim(self, name: str, life: int, keep_from: int) -> None:
        """Whole blocks before a position are given up."""
        if self.life.get(name) != life:
            return
        self.renew_lease(name)
        for shard, part in self.of(name).items():
            tokens = max(0, keep_from - part.first) // BLOCK_TOKENS * BLOCK_TOKENS
            part.first, part.tokens = part.first + tokens, part.tokens[tokens:]
            if part.end <= keep_from:
                del self.parts[shard]

    def accept(self, row: PlanRow) -> bool:
        """Whether a row is served; commits what its start makes certain."""
        part = self.parts.get(row.shard)
        if part is None or self.life[part.name] != row.generation:
            return False
        self.renew_lease(part.name)
        pending = part.pending
        if pending is not None and row.start > pending.start:
            if pending.step.layers < LAYERS:
                return False
            part.tokens += pending.tokens[: row.start - pending.start]
            part.pending = None
        sees = row.visible_first < row.visible_end
        if sees and (row.visible_first < part.first or row.visible_end > part.committed):
            return False
        return not row.token_ids or (row.start == part.committed and row.start + row.count <= part.end)

    def announce(self, step: Step, row: PlanRow) -> None:
        """The row's chunk takes the place of one that is pending."""
        if row.token_ids:
            part = self.parts[row.shard]
            if part.pending is not None:
                part.pending.step.superseded = True
            part.pending = step.chunks[row.shard] = Chunk(row.start, list(row.token_ids), step)

    def account(self) -> BlockAccount:
        """The state of every block."""
        reserved = opened = sealed = 0
        for part in self.parts.values():
            written = part.committed
            if part.pending is not None:
                written = max(written, part.pending.start + len(part.pending.tokens))
            full, touched = len(part.tokens) // BLOCK_TOKENS, blocks_for(written - part.first)
            sealed += full
            opened += touched - full
            reserved += part.blocks - touched
        return BlockAccount(BLOCKS, self.free(), reserved, opened, sealed, 0)
