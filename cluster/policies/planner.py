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
    """An attention worker's arena as last heard. `home`: the dense worker whose instance it belongs to; None
    where all dense workers share it. `read_tokens`: what its sequences have there, together; more than it
    holds where they share blocks, which each of them reads. `tier`: of the arenas that the process in `slot`
    has, 0 the best.
    """

    worker: WorkerId
    home: WorkerId | None
    capacity_tokens: int
    free_tokens: int
    read_tokens: int
    tier: int = 0
    slot: str = ""

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
    round. `may_lend`: whether instances give to each other.
    """

    block_tokens: int
    full_use: float = 0.85
    gain_least: float = 0.01
    uneven_least: float = 0.25
    moves_most: int = 8
    may_lend: bool = True


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
    for worker in round_.debtors() if policy.may_lend else ():
        while len(round_.moves) < policy.moves_most and round_.relieve(worker):
            pass
    for improve in (round_.lower, round_.lift, round_.level):
        while len(round_.moves) < policy.moves_most and improve():
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

    def lower(self) -> bool:
        """Move what is too much for an arena to a slower tier of its home, in the same process if it can.

        Placement fills the better tiers first. Context that only decoding reads is what a slower tier serves
        best; prompts to come, of which each row reads all that is before it, find room in the better one.
        """
        for arenas in self._homes.values():
            lending = [arena for arena in arenas.values() if arena.tier and self._lends(arena)]
            lending.sort(key=lambda arena: (arena.tier, -arena.free_tokens, arena.worker))
            for source in arenas.values() if lending else ():
                if source.use > self._policy.full_use:
                    target = _of_own_process(source, [each for each in lending if each.tier > source.tier])
                    if target is not None and self._relax(source, target):
                        return True
        return False

    def lift(self) -> bool:
        """Move back to a better tier that has emptied. What has been lowered leaves it fuller than that."""
        emptied = self._policy.full_use - self._policy.uneven_least
        for arenas in self._homes.values():
            giving = [arena for arena in arenas.values() if arena.tier and arena.read_tokens]
            giving.sort(key=lambda arena: (-arena.tier, -arena.read_tokens, arena.worker))
            for target in arenas.values() if giving else ():
                if target.use <= emptied:
                    source = _of_own_process(target, [each for each in giving if each.tier > target.tier])
                    if source is not None and self._fill(source, target):
                        return True
        return False

    def level(self) -> bool:
        """Move from the busiest arena of a home's tier to the one of which least is read, where they differ
        most.

        Blocks that many sequences share are read by each of them: moving one of these copies the blocks, and
        those that follow find them there. So hot blocks are replicated.
        """
        pairs = []
        for arenas in self._tiers():
            by_load = sorted(arenas, key=lambda arena: (arena.load, arena.worker))
            if by_load[-1].load - by_load[0].load >= self._policy.uneven_least:
                pairs.append((by_load[-1], by_load[0]))
        pairs.sort(key=lambda pair: (pair[1].load - pair[0].load, pair[0].worker))
        return any(self._move(source, target) for source, target in pairs)

    def _find_creditors(self) -> list[ArenaView]:
        """Arenas with room to lend, the roomiest first."""
        arenas = (arena for home in self._homes.values() for arena in home.values())
        return sorted(filter(self._lends, arenas), key=lambda arena: (-arena.free_tokens, arena.worker))

    def _lends(self, arena: ArenaView) -> bool:
        return arena.use < self._policy.full_use

    def _tiers(self) -> list[list[ArenaView]]:
        """Arenas of the same home that are as fast as each other."""
        found: dict[tuple[WorkerId | None, int], list[ArenaView]] = {}
        for home, arenas in self._homes.items():
            for arena in arenas.values():
                found.setdefault((home, arena.tier), []).append(arena)
        return list(found.values())

    def _is_short(self, instance: InstanceView) -> bool:
        own = self._homes.get(instance.worker, {}).values()
        free = sum(arena.free_tokens for arena in own)
        kept = (1 - self._policy.full_use) * sum(arena.capacity_tokens for arena in own)
        return bool(own) and free < max(kept, instance.waiting * instance.waiting_tokens)

    def _move(self, source: ArenaView, target: ArenaView) -> bool:
        """The part of the longest sequence at `source` that gains most; False where none does."""
        key, sizes = self._parts(source, target)
        before = self._rate(source, target, 0)
        rates = {size: self._rate(source, target, size) for size in sizes}
        best = max(rates, key=lambda size: rates[size], default=0)
        if key is None or best == 0 or rates[best] - before < self._policy.gain_least * before:
            return False
        self._note(Move(key, source.worker, target.worker, best), source, target)
        return True

    def _relax(self, source: ArenaView, target: ArenaView) -> bool:
        """The smallest part of the longest sequence at `source` without which that is no longer too full, or
        else the largest; False where it would free nothing.
        """
        key, sizes = self._parts(source, target)
        excess = (source.use - self._policy.full_use) * source.capacity_tokens
        size = next((size for size in sizes if source.freed_by(size) >= excess), max(sizes, default=0))
        if key is None or source.freed_by(size) < self._policy.block_tokens:
            return False
        self._note(Move(key, source.worker, target.worker, size), source, target)
        return True

    def _fill(self, source: ArenaView, target: ArenaView) -> bool:
        """As much of the longest sequence at `source` as the other arena's mark allows."""
        key, sizes = self._parts(source, target)
        if key is None or not sizes:
            return False
        self._note(Move(key, source.worker, target.worker, sizes[-1]), source, target)
        return True

    def _parts(self, source: ArenaView, target: ArenaView) -> tuple[SequenceKey | None, list[int]]:
        """The longest sequence at `source` that did not move yet; how much of it might, smallest first."""
        held = {key: tokens for key, tokens in self._held(source.worker).items() if key not in self._moved}
        if not held:
            return None, []
        key = max(held, key=lambda item: (held[item], item))
        room = target.free_tokens - (1 - self._policy.full_use) * target.capacity_tokens
        sizes = {self._whole(min(held[key] * share, room)) for share in _SHARES}
        return key, sorted(size for size in sizes if size > 0)

    def _note(self, move: Move, source: ArenaView, target: ArenaView) -> None:
        for arena in _after(source, target, move.tokens):
            self._homes[arena.home][arena.worker] = arena
        self._moved.add(move.sequence)
        self.moves.append(move)

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


def _of_own_process(arena: ArenaView, others: Sequence[ArenaView]) -> ArenaView | None:
    """The first of its own process, or else the first."""
    return next((each for each in others if each.slot == arena.slot), next(iter(others), None))


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
