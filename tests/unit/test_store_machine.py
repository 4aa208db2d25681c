"""A store under any order of reservations, steps, releases, take-overs and time, beside a model of the rules.

The model is dictionaries only. It says of each call whether it succeeds or how it fails, and after each
rule the account, the holdings with their leases, and every number a later step would read must agree.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.clock import ManualClock
from cluster.errors import Fenced
from cluster.types import Epoch, KvGeometry, ShardId, WorkerId
from tests.attention_builders import LEASE_MS, generation, key
from tests.store_model import BLOCK_TOKENS, BLOCKS, LAYERS, LEASE_S, Part, Step, StoreModel
from workers.attention.arena import Arena
from workers.attention.prepared_step import PreparedStep
from workers.attention.shard_blocks import BlockAccount
from workers.attention.store import Store
from workers.lanes.messages import PlanRow

GEOMETRY = KvGeometry(LAYERS, 1, 1, 1, "float32", BLOCK_TOKENS, "digest")

NAMES = st.sampled_from("ab")
OFFS = st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1])
"""How far a speaker's life lies from the one that may speak: mostly it does not."""

PICK = st.integers(0, 1000)
VARIANTS = st.sampled_from([0, 0, 0, 1])


class StoreMachine(RuleBasedStateMachine):
    """Two sequences, any number of lives each, nine blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.store = Store(WorkerId("attention-0"), Epoch(7), GEOMETRY, BLOCKS, LEASE_MS, self.clock)
        self.arena = Arena(GEOMETRY, BLOCKS, torch.device("cpu"))
        self.model = StoreModel(self.clock)
        self.known: list[tuple[int, int]] = []
        """Every (shard id, life) ever granted, so that stale speakers are heard too."""
        self.steps: list[Step] = []
        self.number = 0.0

    # Rules

    @initialize()
    def begin(self) -> None:
        """Both sequences have something."""
        self.reserve("a", 0, 0, 10, False)
        self.reserve("b", 0, 3, 9, False)

    @rule(name=NAMES, off=OFFS, pick=PICK, length=st.integers(1, 12), beside=st.booleans())
    def reserve(self, name: str, off: int, pick: int, length: int, beside: bool) -> None:
        """Room at a shard's end or anywhere."""
        life = self.model.alive(name) + off
        ends = [part.end for part in self.model.of(name).values()]
        first = ends[pick % len(ends)] if ends and beside else pick % 12
        end = first + length
        error = self.model.reserve_error(name, life, first, end)
        if error is not None:
            with pytest.raises(error):
                self.store.reserve(key(name), generation(life), first, end)
            return
        granted = self.store.reserve(key(name), generation(life), first, end)
        if self.model.life.get(name) != life:
            self.model.drop(name)
        grown = [shard for shard, part in self.model.of(name).items() if part.end == first]
        if grown:
            assert granted.shard.shard == grown[0]
            self.model.parts[grown[0]].end = end
        else:
            assert granted.shard.shard not in [shard for shard, _ in self.known]
            self.model.parts[granted.shard.shard] = Part(name, first, end)
        self.known.append((granted.shard.shard, life))
        self.model.life[name] = life
        self.model.renew_lease(name)
        assert (granted.blocks_available, granted.lease_ms) == (self.model.free(), LEASE_MS)

    @rule(name=NAMES, off=OFFS, rarely=PICK)
    def release(self, name: str, off: int, rarely: int) -> None:
        """All blocks come back, unless a lower life speaks."""
        life = self.model.alive(name) + off
        if off >= 0 and rarely % 8:
            return
        if life < self.model.life.get(name, self.model.dead(name)):
            with pytest.raises(Fenced):
                self.store.release(key(name), generation(life))
            return
        blocks = sum(part.blocks for part in self.model.of(name).values())
        assert self.store.release(key(name), generation(life)) == blocks
        self.model.fence(name, life)
        self.model.drop(name)

    @rule(
        name=NAMES,
        off=st.sampled_from([-1, 0, 0, 0, 1]),
        length=st.sampled_from([0, 3, 8, 24, 24, 24, 24]),
        differs_at=st.sampled_from([2, 7, 11, 40, 40, 40]),
    )
    def adopt(self, name: str, off: int, length: int, differs_at: int) -> None:
        """What the tokens confirm stays, up to the first that differs."""
        life = self.model.alive(name) + off
        tokens = [position + 100 * (position >= differs_at) for position in range(length)]
        if self.model.is_fenced(name, life):
            with pytest.raises(Fenced):
                self.store.adopt(key(name), generation(life), tokens)
            return
        self.store.adopt(key(name), generation(life), tokens)
        self.model.fence(name, life - 1)
        if self.model.life.get(name, life) < life:
            self.model.truncate(name, tokens)
            self.model.life[name] = life
            if not self.model.of(name):
                self.model.drop(name)
        if name in self.model.life:
            self.model.renew_lease(name)
            self.known += [(shard, life) for shard in self.model.of(name)]

    @rule(name=NAMES, off=OFFS, pick=PICK)
    def trim(self, name: str, off: int, pick: int) -> None:
        """Whole blocks before a position come back, if it is certain and no lower life speaks."""
        life = self.model.alive(name) + off
        if off >= 0 and pick % 3:
            return
        keep_from = pick % 13
        if not self.model.may_trim(name, life, keep_from):
            with pytest.raises(Fenced):
                self.store.trim(key(name), generation(life), keep_from)
            return
        free = self.model.free()
        self.model.trim(name, life, keep_from)
        assert self.store.trim(key(name), generation(life), keep_from) == self.model.free() - free

    @precondition(lambda self: self.model.parts)
    @rule(
        picks=st.lists(PICK, min_size=1, max_size=3),
        off=OFFS,
        aheads=st.tuples(PICK, PICK, PICK),
        variant=VARIANTS,
        layers=st.integers(0, LAYERS),
    )
    def begin_step(
        self, picks: list[int], off: int, aheads: tuple[int, int, int], variant: int, layers: int
    ) -> None:
        """Rows at what is committed, pending or off it; sometimes by a stale speaker; some layers at once."""
        held = [(shard, self.model.life[part.name]) for shard, part in self.model.parts.items()]
        known = self.known if off else held
        named = dict(known[pick % len(known)] for pick in picks)
        named[next(iter(named))] += off
        rows = [
            self.row(shard, life, ahead, variant)
            for (shard, life), ahead in zip(named.items(), aheads, strict=False)
        ]
        faults = [int(row.shard) for row in rows if not self.model.accept(row)]
        if faults:
            with pytest.raises(Fenced) as caught, self.store.turns:
                PreparedStep(self.store, self.arena, rows)
            assert caught.value.metadata["shards"] == ",".join(map(str, faults))
            return
        step = Step(named)
        with self.store.turns:
            step.prepared = PreparedStep(self.store, self.arena, rows)
        for row in rows:
            self.model.announce(step, row)
        self.check_numbers(step.prepared, rows)
        self.steps.append(step)
        for _ in range(layers):
            self.append_layer(0, 0)

    @precondition(lambda self: self.model.parts)
    @rule(pick=st.integers(0, 3), layers=st.sampled_from([LAYERS, LAYERS, LAYERS, 1]))
    def decode(self, pick: int, layers: int) -> None:
        """A step as it should be, most of the time with all its layers."""
        self.begin_step([pick], 0, (1, 1, 1), 0, layers)

    @precondition(lambda self: self.model.parts)
    @rule(pick=st.integers(0, 3), again=st.booleans())
    def decode_twice(self, pick: int, again: bool) -> None:
        """Two steps, so that something is certain; the second may not be the last."""
        self.decode(pick, LAYERS)
        if self.model.parts:
            self.decode(pick, LAYERS if again else 1)

    def row(self, shard: int, life: int, ahead: int, variant: int) -> PlanRow:
        """A row at the committed length, one past the pending chunk, or a position off."""
        part = self.model.parts.get(shard, Part("gone", 0, 9))
        pending = part.pending
        after = pending.start + len(pending.tokens) if pending else part.committed
        right = after if pending and pending.step.layers == LAYERS else part.committed
        near = (after - 1, after, part.committed + 1, part.committed - 1)
        start = max(part.first, near[ahead % 4]) if ahead % 5 == 0 else right
        count = max(1, min(1 + ahead % 3, part.end - start + (ahead % 11 == 0)))
        end = min(start, part.end)
        tokens = tuple(p + 100 * variant for p in range(start, start + count)) if ahead % 7 else ()
        return PlanRow(ShardId(shard), generation(life), start, count, part.first, end, tokens)

    def check_numbers(self, prepared: PreparedStep, rows: list[PlanRow]) -> None:
        """The slots a step would read hold, in every layer, what was last written at their positions."""
        spans = iter(prepared.spans)
        for row in rows:
            if row.visible_first == row.visible_end:
                continue
            span, part = next(spans), self.model.parts[row.shard]
            assert span.first_position + span.visible_start == row.visible_first
            assert span.visible_end - span.visible_start == row.visible_end - row.visible_first
            for layer in range(LAYERS):
                keys = self.arena.layer(layer).key[list(span.blocks)].flatten()
                found = keys[span.visible_start : span.visible_end].tolist()
                visible = range(row.visible_first, row.visible_end)
                assert found == [part.numbers[layer, position] for position in visible]

    @precondition(lambda self: self.steps)
    @rule(pick=PICK, skip=st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
    def append_layer(self, pick: int, skip: int) -> None:
        """One layer of one of the last steps, mostly the one that is due; rows that lost their shard since
        are left out.
        """
        step = self.steps[-1 - pick % min(len(self.steps), 4)]
        assert step.prepared is not None
        rows = sum(len(chunk.tokens) for chunk in step.chunks.values())
        keys = torch.arange(self.number, self.number + rows).reshape(rows, 1, 1)
        self.number += rows
        if skip or step.superseded or step.layers == LAYERS:
            with self.store.turns, pytest.raises(Fenced):
                step.prepared.append(step.layers + skip, keys, -keys)
            return
        with self.store.turns:
            step.prepared.append(step.layers, keys, -keys)
        numbers = iter(keys.flatten().tolist())
        for shard, chunk in step.chunks.items():
            part = self.model.parts.get(shard)
            held = part is not None and self.model.life[part.name] == step.lives[shard]
            for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                number = next(numbers)
                if part is not None and held:
                    part.numbers[step.layers, position] = number
        step.layers += 1

    @rule(names=st.lists(NAMES, unique=True))
    def renew(self, names: list[str]) -> None:
        """Leases of what is held begin anew; what is not held is named."""
        assert self.store.renew(map(key, names)) == tuple(key(n) for n in names if n not in self.model.life)
        for name in names:
            if name in self.model.life:
                self.model.renew_lease(name)

    @rule(
        seconds=st.sampled_from(
            [0.0, 0.125 * LEASE_S, 0.125 * LEASE_S, 0.25 * LEASE_S, 0.5 * LEASE_S, LEASE_S]
        )
    )
    def expire(self, seconds: float) -> None:
        """Time passes; whoever was silent for a lease is freed and fenced."""
        self.clock.advance(seconds)
        over = {name for name, end_s in self.model.lease.items() if end_s <= self.clock()}
        assert set(self.store.expire()) == {key(name) for name in over}
        for name in over:
            self.model.fence(name, self.model.life[name])
            self.model.drop(name)

    @rule(draining=st.sampled_from([False, False, False, True]))
    def drain(self, draining: bool) -> None:
        """The worker begins to drain, or its drain is called off."""
        self.model.draining = self.store.draining = draining

    # What always holds

    @invariant()
    def the_account_is_the_models(self) -> None:
        """Every block is in one state, and it is the state the model computes."""
        assert self.store.audit() == self.model.account()
        assert self.store.empty.is_set() == (not self.model.life)

    @invariant()
    def the_holdings_are_the_models(self) -> None:
        """Shards, their certain lengths, lives and leases agree."""
        found = {name.request_id: (shards, left_s) for name, shards, left_s in self.store.holdings()}
        assert found.keys() == self.model.life.keys()
        for name, (shards, left_s) in found.items():
            parts = sorted(self.model.of(name).items(), key=lambda item: item[1].first)
            assert left_s == pytest.approx(max(0.0, self.model.lease[name] - self.clock()))
            assert [
                (h.shard.shard, h.shard.first, h.shard.end, h.committed_tokens, h.blocks, h.generation)
                for h in shards
            ] == [(i, p.first, p.end, len(p.tokens), p.blocks, self.model.life[name]) for i, p in parts]

    def teardown(self) -> None:
        """When everything is released every block is free."""
        for name in "ab":
            self.store.release(key(name), generation(99))
        assert self.store.audit() == BlockAccount(BLOCKS, BLOCKS, 0, 0, 0, 0)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
