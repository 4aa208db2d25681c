"""A simulated dense worker: the project's own scheduler, with steps that take modelled time.

    plan  ->  room asked for, answered `call_s` later  ->  step priced  ->  at its end: apply, and plan again

As in the real engine, what comes in during a step is heard before the next plan, and an engine without rows
sleeps until something comes or a pause of the scheduler ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

from cluster.errors import AnabranchError, DeadlineExceeded, ResourceExhausted
from cluster.policies.prefixes import PrefixIndex, Source, blocks_known, go_on
from cluster.policies.scheduler import RoomRequest, Scheduler, SchedulerLimits, StepPlan
from cluster.types import SequenceKey, ShardRef
from loadgen.simulation.pool import ModelledPool
from loadgen.simulation.prefixes import KnownChain, ReportedDirectory
from loadgen.simulation.steps import Pricing, StepTimes
from loadgen.simulation.tally import Tally
from loadgen.simulation.timeline import Timeline
from loadgen.simulation.work import Places, PlannedRow

_SHARES_NOTHING = KnownChain(1)


@dataclass(slots=True, eq=False)
class SimulatedSequence:
    """One request at a dense worker: what it wants, what it holds, and where its seconds went."""

    key: SequenceKey
    prompt_tokens: int
    output_tokens: int
    deadline_s: float
    submitted_s: float
    ended: Callable[[SimulatedSequence, AnabranchError | None], None]
    """Told once: None where all tokens came."""
    admitted_s: float | None = None
    tokens_s: list[float] = field(default_factory=list)
    """When its client saw each token."""
    shards: list[ShardRef] = field(default_factory=list)
    places: Places = ()
    chain: KnownChain = _SHARES_NOTHING
    cached_tokens: int = 0
    dense_s: float = 0.0
    attention_s: float = 0.0
    lane_s: float = 0.0
    waited_s: float = 0.0
    preemptions: int = 0


class Queues:
    """When each of several workers, or cores, is done with what it was given: none does more than a second of
    work in a second. Within that, what several dense workers give it is taken to interleave without loss.
    """

    def __init__(self, places: int) -> None:
        self._free_s = [0.0] * places

    def book(self, now_s: float, who: int, seconds: float) -> float:
        """When work that is given now is done, where there are any: `who` are dealt to them in turn."""
        if not seconds or not self._free_s:
            return now_s
        place = who % len(self._free_s)
        self._free_s[place] = max(self._free_s[place], now_s) + seconds
        return self._free_s[place]


@dataclass(frozen=True, slots=True)
class Site:
    """What the dense workers of a cluster have together. `call_s`: of a call between processes."""

    timeline: Timeline
    pool: ModelledPool
    queues: Queues
    """Of attention workers, or of cores they share; none where the cache is local."""
    cores: Queues
    """That dense workers share, dealt out in turn; none where each has its own."""
    tally: Tally
    call_s: float
    directory: ReportedDirectory | None
    """None where the cache is local: nobody else could have left a prefix."""

    def ends_s(self, dense: int, times: StepTimes) -> float:
        """When a step that a dense worker begins now ends, whoever else has work on the same devices."""
        now_s = self.timeline.now_s
        booked = [self.queues.book(now_s, worker, s) for worker, s in enumerate(times.attention_s)]
        return max(now_s + times.wall_s, self.cores.book(now_s, dense, times.dense_s), *booked)


class SimulatedEngine:
    """Owns the scheduler and the live sequences of dense worker `index`."""

    def __init__(self, index: int, site: Site, limits: SchedulerLimits, pricing: Pricing) -> None:
        self.index = index
        self._site = site
        self._pricing = pricing
        self._scheduler = Scheduler(limits)
        self._index_of_prefixes = PrefixIndex()
        self._live: dict[SequenceKey, SimulatedSequence] = {}
        self._inbox: list[Callable[[], None]] = []
        self._steps = False
        self._due_s = inf

    @property
    def load(self) -> int:
        """Sequences that live here."""
        return len(self._live)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place in it."""
        return self._scheduler.waiting

    def submit(self, sequence: SimulatedSequence) -> None:
        """Take a sequence in, or end it with the error a dense worker would answer."""
        self._hear(partial(self._submit, sequence))

    def leave(self) -> list[SimulatedSequence]:
        """What lived here when the simulation was stopped."""
        return list(self._live.values())

    def _hear(self, call: Callable[[], None]) -> None:
        self._inbox.append(call)
        if not self._steps:
            self._turn()

    def _submit(self, sequence: SimulatedSequence) -> None:
        most = sequence.prompt_tokens + sequence.output_tokens
        try:
            reason = self._site.pool.inadmissible(self.index, most)
            if reason is not None:
                raise ResourceExhausted(reason)
        except AnabranchError as error:
            sequence.ended(sequence, error)
            return
        self._live[sequence.key] = sequence
        asks = sequence.chain.is_asked_for and self._site.directory is not None
        if asks or self._remembered(sequence.chain):
            calls = asks + bool(sequence.chain.hashes)
            moment_s = self._site.timeline.now_s + calls * self._site.call_s
            self._site.timeline.at(moment_s, partial(self._hear, partial(self._acquire, sequence)))
        else:
            self._schedule(sequence)

    def _acquire(self, sequence: SimulatedSequence) -> None:
        """What this worker remembers of the prefix, and what the directory knows beyond it, as it lies."""
        pool, chain = self._site.pool, sequence.chain
        known = self._remembered(chain)
        if self._site.directory is not None:
            before = blocks_known(known, chain.block_tokens)
            runs = self._site.directory.find(chain.hashes[before:], before)
            known = go_on(known, runs, chain.block_tokens, pool.may_use(self.index))
        sequence.shards = pool.acquire(known, chain)
        sequence.cached_tokens = sum(shard.end - shard.first for shard in sequence.shards)
        self._schedule(sequence)

    def _remembered(self, chain: KnownChain) -> tuple[Source, ...]:
        return self._index_of_prefixes.sources(chain, self._site.pool.may_use(self.index))

    def _schedule(self, sequence: SimulatedSequence) -> None:
        """Queue it with what was found."""
        self._take_places(sequence)
        ranges = [(shard.first, shard.end) for shard in sequence.shards]
        try:
            self._scheduler.submit(
                sequence.key,
                sequence.prompt_tokens,
                0,
                sequence.deadline_s,
                self._site.timeline.now_s,
                max_length=sequence.prompt_tokens + sequence.output_tokens,
                room=ranges,
                computed=ranges,
            )
        except AnabranchError as error:
            self._end(sequence, error)

    def _take_places(self, sequence: SimulatedSequence) -> None:
        pool = self._site.pool
        sequence.places = [(pool.index_of(s.worker), s.first, s.end) for s in sequence.shards]

    def _publish(self, sequence: SimulatedSequence, computed: int) -> None:
        """Blocks that a step made certain may be shared, and are remembered."""
        self._site.pool.publish(sequence.shards, sequence.chain, computed)
        for shard in sequence.shards:
            arena = self._site.pool.arena(shard.worker)
            if self._site.directory is not None:
                self._site.directory.expect(arena.worker, arena.shared)
        if len(sequence.tokens_s) == 1:
            self._index_of_prefixes.remember(sequence.chain, sequence.shards)

    def _turn(self) -> None:
        """Plan, and begin a step or sleep."""
        for call in self._inbox:
            call()
        self._inbox.clear()
        now_s = self._site.timeline.now_s
        plan = self._scheduler.plan(now_s)
        self._carry_out(plan)
        self._steps = bool(plan.rows)
        if not self._steps:
            self._sleep(self._scheduler.due_s())
            return
        sequences = [self._live[row.key] for row in plan.rows]
        times = self._price(plan, sequences)
        ends_s = self._site.ends_s(self.index, times)
        self._site.tally.step(now_s, ends_s, len(plan.rows), plan.tokens, times, self._site.pool.used_share)
        self._site.timeline.at(ends_s, partial(self._end_step, plan, sequences, times, ends_s - now_s))

    def _sleep(self, until_s: float) -> None:
        if self._live and until_s < inf and until_s != self._due_s:
            self._due_s = until_s
            self._site.timeline.at(until_s, partial(self._wake, until_s))

    def _wake(self, asked_s: float) -> None:
        if asked_s == self._due_s:
            self._due_s = inf
            if not self._steps:
                self._turn()

    def _carry_out(self, plan: StepPlan) -> None:
        """Free what was preempted, end what is over, ask for room."""
        for key in plan.preempted:
            sequence = self._live[key]
            sequence.preemptions += 1
            self._give_back(sequence)
        for key in plan.expired:
            self._end(self._live[key], DeadlineExceeded("the request's deadline passed before it was done"))
        for key in plan.exhausted:
            self._end(
                self._live[key], ResourceExhausted("no attention worker has room, and nobody gives way")
            )
        for request in plan.room:
            moment_s = self._site.timeline.now_s + self._site.call_s
            self._site.timeline.at(moment_s, partial(self._hear, partial(self._answer, request)))

    def _answer(self, request: RoomRequest) -> None:
        """A reservation comes to the arenas, and its answer back."""
        sequence = self._live.get(request.key)
        if sequence is None or self._scheduler.generation(request.key) != request.generation:
            return
        before = sequence.shards
        after = self._site.pool.reserve(self.index, request.first, request.end, before)
        if after == before:
            self._scheduler.refused(request, self._site.timeline.now_s)
            return
        sequence.shards = after
        self._take_places(sequence)
        granted = self._scheduler.granted(request, [(s.first, s.end) for s in after if s not in before])
        assert granted, "what is of this generation is awaited"

    def _price(self, plan: StepPlan, sequences: Sequence[SimulatedSequence]) -> StepTimes:
        """What the plan's step takes."""
        rows = []
        for row, sequence in zip(plan.rows, sequences, strict=True):
            if sequence.admitted_s is None:
                sequence.admitted_s = self._site.timeline.now_s
            rows.append(PlannedRow(row.key, row.start, row.count, row.samples, sequence.places))
        return self._pricing.price(rows)

    def _end_step(
        self, plan: StepPlan, sequences: Sequence[SimulatedSequence], times: StepTimes, wall_s: float
    ) -> None:
        """Tokens leave, counters move, and the next step is planned."""
        seen_s = self._site.timeline.now_s + self._site.call_s
        dense_s, attention_s, lane_s = times.dense_s, times.slowest_s, times.lane_s
        waited_s = max(0.0, wall_s - dense_s)
        sampled: dict[SequenceKey, int] = {}
        ended: list[SimulatedSequence] = []
        for row, sequence in zip(plan.rows, sequences, strict=True):
            sequence.dense_s += dense_s
            sequence.attention_s += attention_s
            sequence.lane_s += lane_s
            sequence.waited_s += waited_s
            if row.samples:
                sequence.tokens_s.append(seen_s)
                if len(sequence.tokens_s) == sequence.output_tokens:
                    ended.append(sequence)
                else:
                    sampled[row.key] = 1
            if sequence.chain.hashes:
                self._publish(sequence, row.start + row.count)
        self._scheduler.apply(plan, sampled)
        for sequence in ended:
            self._scheduler.finish(sequence.key)
            self._end(sequence, None)
        self._turn()

    def _end(self, sequence: SimulatedSequence, error: AnabranchError | None) -> None:
        del self._live[sequence.key]
        self._give_back(sequence)
        sequence.ended(sequence, error)

    def _give_back(self, sequence: SimulatedSequence) -> None:
        self._site.pool.release(sequence.shards)
        sequence.shards, sequence.places = [], ()
