"""The scheduler against a model: a pool of a few tokens, late answers, losses, holds, aborts, windows."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from cluster.errors import AlreadyExists, ResourceExhausted
from cluster.policies.scheduler import RoomRequest, Row, Scheduler, SchedulerLimits, StepPlan
from cluster.types import SequenceKey

FOREVER_S = 1e9
PRIORITIES = st.integers(0, 2)


@dataclass
class Truth:
    """What a sequence really has: positions with KV, shards, and known tokens. `expired`: out of window."""

    length: int
    max_length: int
    deadline_s: float
    rank: tuple[int, int]
    generation: int = 0
    expired: int = 0
    present: set[int] = field(default_factory=set)
    shards: list[tuple[int, int]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Tokens held in the pool."""
        return sum(end - first for first, end in self.shards)

    def hole(self) -> int:
        """The first position to compute."""
        return next(p for p in range(self.expired, self.length) if p not in self.present)

    def expire_before(self, position: int) -> None:
        """What lies before is given back."""
        self.expired = position
        self.present = {p for p in self.present if p >= position}
        self.shards = [(max(first, position), end) for first, end in self.shards if end > position]

    def begin_anew(self) -> None:
        """Everything is given back."""
        self.generation, self.expired, self.present, self.shards = self.generation + 1, 0, set(), []

    def go_on(self, window: int) -> bool:
        """After a change, from the last run of KV whose next row sees nothing before it: what is before
        expires. Without one, from 0; False where something has expired already.
        """
        known = {p for p in self.present if p < self.length - 1}
        for start in sorted((p for p in known if p - 1 not in known), reverse=True):
            end = next(p for p in range(start, self.length) if p not in known)
            if start <= max(0, end - window + 1):
                self.expire_before(start)
                return True
        return self.expired == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Random events; every plan is checked against the truth, and at the end everything must end."""

    pending = Bundle("pending")

    @initialize(
        step_tokens=st.integers(4, 12),
        max_batch=st.integers(1, 4),
        ahead=st.integers(1, 6),
        pool_tokens=st.integers(10, 80),
        window=st.none() | st.integers(2, 12),
    )
    def start(
        self, step_tokens: int, max_batch: int, ahead: int, pool_tokens: int, window: int | None
    ) -> None:
        """A scheduler and an empty pool."""
        self.limits = SchedulerLimits(step_tokens, max_batch, 6, ahead, 60, 0.05, 0.5, window)
        self.window = window or self.limits.max_sequence_length
        self.scheduler = Scheduler(self.limits)
        self.pool_tokens = pool_tokens
        self.now_s = 0.0
        self.truth: dict[SequenceKey, Truth] = {}
        self.held: set[SequenceKey] = set()
        self.flying: dict[SequenceKey, Row] = {}
        self.plan: StepPlan | None = None
        self.asked: dict[SequenceKey, RoomRequest] = {}
        self.submitted = 0

    # -- events of the world

    @rule(
        length=st.integers(1, 30),
        more=st.integers(1, 12),
        priority=PRIORITIES,
        life_s=st.sampled_from([0.3, FOREVER_S]),
    )
    def submit(self, length: int, more: int, priority: int, life_s: float) -> None:
        """A request arrives; a full queue refuses it."""
        self.submitted += 1
        key = SequenceKey(f"r{self.submitted}")
        deadline_s = self.now_s + life_s
        full = self.scheduler.waiting >= self.limits.max_waiting
        try:
            self.scheduler.submit(key, length, priority, deadline_s, self.now_s, max_length=length + more)
        except ResourceExhausted:
            assert full
        else:
            assert not full
            self.truth[key] = Truth(length, length + more, deadline_s, (priority, self.submitted))

    @rule(data=st.data(), length=st.integers(4, 30), more=st.integers(1, 8))
    def adopt(self, data: st.DataObject, length: int, more: int) -> None:
        """A sequence arrives with shards and committed ranges, holes included."""
        edges = sorted(data.draw(st.sets(st.integers(1, length), min_size=1, max_size=4)))
        shards = [(a, b) for a, b in zip([0, *edges], edges, strict=False) if data.draw(st.booleans())]
        if self.scheduler.waiting >= self.limits.max_waiting or sum(b - a for a, b in shards) > self.free:
            return
        committed = [(a, data.draw(st.integers(a, b))) for a, b in shards]
        self.submitted += 1
        key = SequenceKey(f"r{self.submitted}")
        self.scheduler.submit(
            key, length, 1, FOREVER_S, self.now_s, max_length=length + more, room=shards, computed=committed
        )
        truth = Truth(length, length + more, FOREVER_S, (1, self.submitted), shards=shards)
        truth.present = {p for a, b in committed for p in range(a, b) if p < length - 1}
        assert truth.go_on(self.window)
        self.truth[key] = truth

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.2]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def duplicate(self, data: st.DataObject) -> None:
        """A live key is refused."""
        key = data.draw(st.sampled_from(sorted(self.truth)))
        try:
            self.scheduler.submit(key, 1, 0, FOREVER_S, self.now_s, max_length=2)
        except AlreadyExists:
            return
        raise AssertionError("a second sequence under a live key")

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A sequence ends early."""
        self.end(data.draw(st.sampled_from(sorted(self.truth))))

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """One shard's worker dies, or forgets its end."""
        key = data.draw(st.sampled_from(sorted(self.truth)))
        truth = self.truth[key]
        if not truth.shards:
            return
        shard = data.draw(st.sampled_from(truth.shards))
        first = data.draw(st.integers(shard[0], shard[1] - 1))
        truth.shards.remove(shard)
        if first > shard[0]:
            truth.shards.append((shard[0], first))
        truth.present -= set(range(first, shard[1]))
        self.flying.pop(key, None)
        begins_anew = self.scheduler.lost(key, [(first, shard[1])])
        assert begins_anew == (not truth.go_on(self.window))
        if begins_anew:
            truth.begin_anew()
            self.asked.pop(key, None)

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """What no row will see is given back."""
        key = data.draw(st.sampled_from(sorted(self.truth)))
        truth = self.truth[key]
        needed = self.scheduler.needed_from(key)
        assert needed == max(0, truth.hole() - self.window + 1)
        position = data.draw(st.integers(truth.expired, needed))
        self.scheduler.expire_before(key, position)
        truth.expire_before(position)

    @precondition(lambda self: set(self.truth) - self.held)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """A gateway goes away."""
        key = data.draw(st.sampled_from(sorted(set(self.truth) - self.held)))
        self.held.add(key)
        self.flying.pop(key, None)
        self.scheduler.hold(key)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """And nobody goes on with what it left."""
        self.end(data.draw(st.sampled_from(sorted(self.held))))

    # -- the engine

    @rule(target=pending)
    def make_plan(self) -> object:
        """A plan, checked; its room requests are answered later, in any order."""
        self.plan = self.scheduler.plan(self.now_s)
        self.check(self.plan)
        for key in (*self.plan.expired, *self.plan.exhausted):
            self.forget(key)
        for key in self.plan.preempted:
            self.truth[key].begin_anew()
            self.asked.pop(key, None)
        self.flying = {row.key: row for row in self.plan.rows}
        for request in self.plan.room:
            assert request.key not in self.asked, "two requests outstanding"
            assert request.generation == self.truth[request.key].generation
            self.asked[request.key] = request
        return multiple(*self.plan.room)

    @rule(request=consumes(pending), pieces=st.integers(1, 3), part=st.booleans(), gloom=st.booleans())
    def answer(self, request: RoomRequest, pieces: int, part: bool, gloom: bool) -> None:
        """The pool grants all, a part, in several shards; or refuses, sometimes without need."""
        current = self.asked.get(request.key) == request
        tokens = request.end - request.first
        if gloom or tokens > self.free:
            self.scheduler.refused(request, self.now_s)
        else:
            end = request.first + max(1, tokens // 2) if part else request.end
            size = -(-(end - request.first) // pieces)
            ranges = [(p, min(p + size, end)) for p in range(request.first, end, size)]
            assert self.scheduler.granted(request, ranges) == current
            if current:
                self.truth[request.key].shards += ranges
        if current:
            del self.asked[request.key]

    @precondition(lambda self: self.plan)
    @rule()
    def apply(self) -> None:
        """The step succeeded; every row still valid counts."""
        assert self.plan is not None
        sampled = {row.key: 1 for row in self.plan.rows if row.samples}
        self.scheduler.apply(self.plan, sampled)
        for key, row in self.flying.items():
            truth = self.truth[key]
            truth.present |= set(range(row.start, row.start + row.count))
            truth.length += row.samples
            if truth.length == truth.max_length:
                self.scheduler.finish(key)
        for key in [key for key, truth in self.truth.items() if truth.length == truth.max_length]:
            self.forget(key)
        self.plan, self.flying = None, {}

    # -- what must hold

    @property
    def free(self) -> int:
        """Tokens left in the pool."""
        return self.pool_tokens - sum(truth.room for truth in self.truth.values())

    def check(self, plan: StepPlan) -> None:
        """Budget, one row each, rows inside one shard, the first hole first, samples only when whole."""
        assert plan.tokens <= self.limits.step_tokens
        assert len(plan.rows) <= self.limits.max_batch
        assert len({row.key for row in plan.rows}) == len(plan.rows)
        assert set(plan.expired) == {k for k, t in self.truth.items() if t.deadline_s <= self.now_s}
        gone = {*plan.expired, *plan.exhausted, *plan.preempted, *self.held}
        live = {*self.truth} - self.held - {*plan.expired}
        first = min(live, key=lambda key: self.truth[key].rank, default=None)
        assert first not in plan.preempted, "the first in rank gives way to nobody"
        assert plan.exhausted in ((), (first,)), "whoever is not first may still get room"
        for row in plan.rows:
            assert row.key not in gone
            truth = self.truth[row.key]
            end = row.start + row.count
            assert row.generation == truth.generation
            assert row.count > 0
            assert row.start == truth.hole()
            seen = range(max(0, row.start - self.window + 1), row.start)
            assert truth.present.issuperset(seen), "every row sees all it should"
            assert truth.present.isdisjoint(range(row.start, end))
            assert any(first <= row.start and end <= last for first, last in truth.shards)
            whole = truth.present.issuperset({*range(truth.expired, truth.length)} - {*range(row.start, end)})
            assert row.samples == whole

    @invariant()
    def counts_agree(self) -> None:
        """The scheduler knows exactly the live sequences, and never more run than may."""
        if hasattr(self, "scheduler"):
            assert self.scheduler.running <= self.limits.max_batch
            known = self.scheduler.running + self.scheduler.waiting + self.scheduler.held
            assert known == len(self.truth)
            assert all(self.scheduler.expired_before(key) == t.expired for key, t in self.truth.items())

    def end(self, key: SequenceKey) -> None:
        """Finish a sequence on both sides."""
        self.scheduler.finish(key)
        self.forget(key)

    def forget(self, key: SequenceKey) -> None:
        """The world's side of an ended sequence."""
        self.truth.pop(key)
        self.held.discard(key)
        self.flying.pop(key, None)
        self.asked.pop(key, None)

    def teardown(self) -> None:
        """Liveness: with honest answers and time, everything submitted ends within a bound."""
        if not hasattr(self, "scheduler"):
            return
        for key in sorted(self.held):
            self.end(key)
        for request in list(self.asked.values()):
            self.answer(request, 1, False, False)
        for _ in range(4000):
            if not self.truth:
                return
            self.make_plan()
            for request in list(self.asked.values()):
                self.answer(request, 1, False, False)
            self.apply()
            self.now_s += 0.02
        raise AssertionError(f"still alive: {self.truth}")


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
