"""A simulated dense worker: the project's own scheduler, with steps that take modelled time.

    plan  ->  room asked for, answered `call_s` later  ->  step priced  ->  at its end: apply, and plan again

As in the real engine, what comes in during a step is heard before the next plan, and an engine without rows
sleeps until something comes or a pause of the scheduler ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf

from cluster.errors import AnabranchError, DeadlineExceeded, ResourceExhausted
from cluster.policies.scheduler import RoomRequest, Row, Scheduler, SchedulerLimits, StepPlan
from cluster.types import SequenceKey, ShardRef
from loadgen.simulation.pool import ModelledPool
from loadgen.simulation.steps import StepModel, StepTimes, Work
from loadgen.simulation.tally import Tally
from loadgen.simulation.timeline import Timeline


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
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """(arena, first, end) of its shards, in order: what a step reads."""
    dense_s: float = 0.0
    attention_s: float = 0.0
    lane_s: float = 0.0
    waited_s: float = 0.0
    preemptions: int = 0


class AttentionQueues:
    """When each attention worker is done with what dense workers gave it: none does more than a second of
    work in a second. Within that, steps of several dense workers are taken to interleave without loss.
    """

    def __init__(self, workers: int) -> None:
        self._free_s = [0.0] * workers

    def book(self, now_s: float, times: StepTimes) -> float:
        """When a step that begins now ends."""
        ends_s = now_s + times.wall_s
        for worker, free_s in enumerate(self._free_s):
            if seconds := times.attention_s[worker]:
                self._free_s[worker] = max(free_s, now_s) + seconds
                ends_s = max(ends_s, self._free_s[worker])
        return ends_s


@dataclass(frozen=True, slots=True)
class Site:
    """What the dense workers of a cluster have together. `prompts_elsewhere`: chunks cost nothing here, as
    where another cluster computes them and their cache comes in the gaps (Lamina's setting).
    """

    timeline: Timeline
    pool: ModelledPool
    steps: StepModel
    queues: AttentionQueues
    """Of attention workers; none where the cache is local."""
    tally: Tally
    prompts_elsewhere: bool = False

    @property
    def call_s(self) -> float:
        """Of a call between processes."""
        return self.steps.efficiencies.call_s


class SimulatedEngine:
    """Owns the scheduler and the live sequences of dense worker `index`."""

    def __init__(self, index: int, site: Site, limits: SchedulerLimits) -> None:
        self._index = index
        self._site = site
        self._scheduler = Scheduler(limits)
        self._live: dict[SequenceKey, SimulatedSequence] = {}
        self._inbox: list[Callable[[], None]] = []
        self._steps = False
        self._due_s = inf

    @property
    def load(self) -> int:
        """Sequences that live here."""
        return len(self._live)

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
        now_s = self._site.timeline.now_s
        try:
            reason = self._site.pool.inadmissible(self._index, most)
            if reason is not None:
                raise ResourceExhausted(reason)
            self._scheduler.submit(
                sequence.key, sequence.prompt_tokens, 0, sequence.deadline_s, now_s, max_length=most
            )
        except AnabranchError as error:
            sequence.ended(sequence, error)
            return
        self._live[sequence.key] = sequence

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
        times = self._site.steps.times(self._work(plan))
        ends_s = self._site.queues.book(now_s, times)
        self._site.tally.step(now_s, ends_s, len(plan.rows), plan.tokens, times, self._site.pool.used_share)
        self._site.timeline.at(ends_s, partial(self._end_step, plan, times, ends_s - now_s))

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
        after = self._site.pool.reserve(self._index, request.first, request.end, before)
        if after == before:
            self._scheduler.refused(request, self._site.timeline.now_s)
            return
        sequence.shards = after
        sequence.places = [(self._site.pool.index_of(s.worker), s.first, s.end) for s in after]
        granted = self._scheduler.granted(request, [(s.first, s.end) for s in after if s not in before])
        assert granted, "what is of this generation is awaited"

    def _work(self, plan: StepPlan) -> Work:
        """What the rows ask of both sides."""
        workers = self._site.steps.workers
        read, queries, appended = [0] * workers, [0] * workers, [0] * workers
        work = Work(0, 0, read, [], queries, appended)
        now_s = self._site.timeline.now_s
        for row in plan.rows:
            sequence = self._live[row.key]
            if sequence.admitted_s is None:
                sequence.admitted_s = now_s
            start = row.start
            if row.count > 1:
                if not self._site.prompts_elsewhere:
                    _add_chunk(work, row, sequence.places)
                    continue
                if not row.samples:
                    continue
                start += row.count - 1
            work.tokens += 1
            for arena, first, end in sequence.places:
                if end > start:
                    appended[arena] += 1
                    if first < start:
                        read[arena] += start - first
                        queries[arena] += 1
                    break
                read[arena] += end - first
                queries[arena] += 1
        return work

    def _end_step(self, plan: StepPlan, times: StepTimes, wall_s: float) -> None:
        """Tokens leave, counters move, and the next step is planned."""
        seen_s = self._site.timeline.now_s + self._site.call_s
        dense_s, attention_s, lane_s = times.dense_s, times.slowest_s, times.lane_s
        waited_s = max(0.0, wall_s - dense_s)
        sampled: dict[SequenceKey, int] = {}
        ended: list[SimulatedSequence] = []
        for row in plan.rows:
            sequence = self._live[row.key]
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
        sequence.shards, sequence.places = [], []


def _add_chunk(work: Work, row: Row, places: list[tuple[int, int, int]]) -> None:
    """A chunk reads what lies before it where it lies, attends to itself, and is appended."""
    work.tokens += row.count
    work.own_scores += row.count * (row.count + 1) // 2
    for arena, first, end in places:
        cached = min(end, row.start) - first
        if cached > 0:
            work.chunks.append((arena, row.count, cached))
            work.queries[arena] += row.count
        if end > row.start:
            work.appended[arena] += row.count
            return
