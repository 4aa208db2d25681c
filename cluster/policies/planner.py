"""Which cache moves where so that the cluster makes more tokens per second. Pure.

DistKV-LLM's greedy plan (Infinite-LLM, arXiv 2401.02669): debtors are instances that could run more if they
had room, creditors are arenas with room; the model T(b, S) chooses how much of a debtor's longest sequence
moves, and the round ends where no move gains. A plan is a proposal: what it knows is a heartbeat old, and the
reservation at the target, made before data moves, is the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.perfmodel import Line
from cluster.types import SequenceKey, WorkerId


@dataclass(frozen=True, slots=True)
class ArenaView:
    """An attention worker as last heard. `home`: the dense worker whose instance it belongs to; None where
    all dense workers share it. `read_tokens`: what its sequences have there, together; more than it holds
    where they share blocks, which each of them reads.
    """

    worker: WorkerId
    home: WorkerId | None
    capacity_tokens: int
    free_tokens: int
    read_tokens: int

    @property
    def use(self) -> float:
        """Share in use, 0 to 1."""
        return 1 - self.free_tokens / self.capacity_tokens if self.capacity_tokens else 1.0

    @property
    def load(self) -> float:
        """What is read there in a step, in arenas: more than 1 where much is shared."""
        return self.read_tokens / self.capacity_tokens if self.capacity_tokens else 0.0

    def freed_by(self, tokens: int) -> int:
        """Room that so many tokens of its sequences leave when they move: what others share stays."""
        held = self.capacity_tokens - self.free_tokens
        return min(tokens, tokens * held // self.read_tokens) if self.read_tokens else 0


@dataclass(frozen=True, slots=True)
class InstanceView:
    """A dense worker as last heard: sequences that run and that wait for room, what one of them needs, and
    how long its steps take: dense work by sequences, attention by tokens of context in one arena.
    """

    worker: WorkerId
    running: int
    waiting: int
    waiting_tokens: float
    dense: Line
    attention: Line


@dataclass(frozen=True, slots=True)
class Move:
    """`tokens` of a sequence, from one arena to another."""

    sequence: SequenceKey
    source: WorkerId
    target: WorkerId
    tokens: int


@dataclass(frozen=True, slots=True)
class PlannerPolicy:
    """`full_use`: an arena fuller than this makes its instance a debtor before room runs out; none is filled
    beyond it by moves. `gain_least`: what a move must add to the tokens per second of those it concerns, as a
    share. `uneven_least`: difference in load between two arenas that is worth levelling. `moves_most`: of one
    round.
    """

    block_tokens: int
    full_use: float = 0.85
    gain_least: float = 0.01
    uneven_least: float = 0.25
    moves_most: int = 8


Held = Callable[[WorkerId], Mapping[SequenceKey, int]]
"""Tokens of each sequence in an arena that may move; sequences that moved lately are left out."""

_SHARES = (1.0, 0.5, 0.25)
"""Parts of what a sequence has in an arena that are tried; the model chooses."""


def plan(
    instances: Sequence[InstanceView], arenas: Sequence[ArenaView], held: Held, policy: PlannerPolicy
) -> tuple[Move, ...]:
    """One round of moves, the best first for each debtor; empty where nothing gains.

    The same views give the same plan. Takes time in the order of arenas, and of sequences in the arenas of
    debtors.
    """
    round_ = _Round(instances, arenas, held, policy)
    for worker in round_.debtors():
        while len(round_.moves) < policy.moves_most and round_.relieve(worker):
            pass
    while len(round_.moves) < policy.moves_most and round_.level():
        pass
    return tuple(round_.moves)


class _Round:
    """A plan in the making: arenas as they will be after the moves so far."""

    def __init__(
        self,
        instances: Sequence[InstanceView],
        arenas: Sequence[ArenaView],
        held: Held,
        policy: PlannerPolicy,
    ) -> None:
        self.moves: list[Move] = []
        self._held = held
        self._policy = policy
        self._moved: set[SequenceKey] = set()
        self._instances = instances
        self._homes: dict[WorkerId | None, dict[WorkerId, ArenaView]] = {}
        for arena in arenas:
            self._homes.setdefault(arena.home, {})[arena.worker] = arena
        self._creditors = self._find_creditors()

    def debtors(self) -> list[WorkerId]:
        """Instances that lack room, or soon will: the smallest batch first."""
        short = [instance for instance in self._instances if self._is_short(instance)]
        return [item.worker for item in sorted(short, key=lambda item: (item.running, item.worker))]

    def relieve(self, debtor: WorkerId) -> bool:
        """Move a part of the debtor's longest sequence to the creditor with most room, if that gains."""
        source = max(self._homes[debtor].values(), key=lambda arena: (arena.use, arena.worker))
        target = next((arena for arena in self._creditors if arena.home != debtor), None)
        if target is None or not self._move(source, target):
            return False
        self._creditors = self._find_creditors()
        return True

    def level(self) -> bool:
        """Move from the busiest arena of a home to the one of which least is read, where they differ most.

        Blocks that many sequences share are read by each of them: moving one of these copies the blocks, and
        those that follow find them there. So hot blocks are replicated.
        """
        pairs = []
        for arenas in self._homes.values():
            by_load = sorted(arenas.values(), key=lambda arena: (arena.load, arena.worker))
            if by_load[-1].load - by_load[0].load >= self._policy.uneven_least:
                pairs.append((by_load[-1], by_load[0]))
        pairs.sort(key=lambda pair: (pair[1].load - pair[0].load, pair[0].worker))
        return any(self._move(source, target) for source, target in pairs)

    def _find_creditors(self) -> list[ArenaView]:
        """Arenas with room to lend, the roomiest first."""
        arenas = (arena for home in self._homes.values() for arena in home.values())
        lending = [arena for arena in arenas if arena.use < self._policy.full_use]
        return sorted(lending, key=lambda arena: (-arena.free_tokens, arena.worker))

    def _is_short(self, instance: InstanceView) -> bool:
        own = self._homes.get(instance.worker, {}).values()
        free = sum(arena.free_tokens for arena in own)
        kept = (1 - self._policy.full_use) * sum(arena.capacity_tokens for arena in own)
        return bool(own) and free < max(kept, instance.waiting * instance.waiting_tokens)

    def _move(self, source: ArenaView, target: ArenaView) -> bool:
        """The part of the longest sequence at `source` that gains most; False where none does."""
        held = {key: tokens for key, tokens in self._held(source.worker).items() if key not in self._moved}
        if not held:
            return False
        key = max(held, key=lambda item: (held[item], item))
        room = target.free_tokens - (1 - self._policy.full_use) * target.capacity_tokens
        sizes = sorted({self._whole(min(held[key] * share, room)) for share in _SHARES})
        before = self._rate(source, target, 0)
        rates = {size: self._rate(source, target, size) for size in sizes if size > 0}
        best = max(rates, key=lambda size: rates[size], default=0)
        if best == 0 or rates[best] - before < self._policy.gain_least * before:
            return False
        for arena in _after(source, target, best):
            self._homes[arena.home][arena.worker] = arena
        self._moved.add(key)
        self.moves.append(Move(key, source.worker, target.worker, best))
        return True

    def _whole(self, tokens: float) -> int:
        """Whole blocks."""
        return int(tokens) // self._policy.block_tokens * self._policy.block_tokens

    def _rate(self, source: ArenaView, target: ArenaView, tokens: int) -> float:
        """Tokens per second of the instances that use these two arenas, were so many moved."""
        homes = {source.home, target.home}
        room = {home: sum(arena.free_tokens for arena in self._homes[home].values()) for home in homes}
        room[source.home] += source.freed_by(tokens)
        room[target.home] -= tokens
        left, come = source.read_tokens - tokens, target.read_tokens + tokens
        reads_both = tokens > 0 or source.home == target.home
        busier = {target.home: come, source.home: max(left, come) if reads_both else left}
        return sum(
            _instance_rate(instance, room[home], busier[home])
            for instance in self._instances
            for home in busier
            if home in (None, instance.worker)
        )


def _instance_rate(instance: InstanceView, free_tokens: int, read_tokens: int) -> float:
    """DistKV-LLM's b / T(b, S): b with those that wait as far as there is room, in part too, so that small
    moves count; S what is read in the busier arena, since arenas attend side by side.
    """
    admitted: float = instance.waiting
    if instance.waiting_tokens > 0:
        admitted = min(admitted, free_tokens / instance.waiting_tokens)
    batch = instance.running + admitted
    step_s = instance.dense.at(batch) + instance.attention.at(read_tokens)
    return batch / step_s if step_s > 0 else 0.0


def _after(source: ArenaView, target: ArenaView, tokens: int) -> tuple[ArenaView, ArenaView]:
    freed = source.freed_by(tokens)
    return (
        replace(source, free_tokens=source.free_tokens + freed, read_tokens=source.read_tokens - tokens),
        replace(target, free_tokens=target.free_tokens - tokens, read_tokens=target.read_tokens + tokens),
    )
