"""The engine of a dense worker: plan, run, apply, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cluster.clock import Clock, monotonic
from cluster.config import Config
from cluster.config_values import Serves
from cluster.errors import Fenced, Internal, NeedFull
from cluster.fault_points import reach
from cluster.perfmodel import Line
from cluster.policies.micro_batches import MicroBatches
from cluster.policies.prefixes import Find, PrefixIndex
from cluster.policies.scheduler import Scheduler, StepPlan
from cluster.policies.settings import placement_policy, scheduler_limits
from cluster.telemetry import logger
from cluster.types import Epoch, Generation, SequenceKey, WorkerId
from workers.dense.deltas import FinishReason, Handoff, Outbox, Subscriber
from workers.dense.emulated_attention import DensePace
from workers.dense.inbox import Inbox
from workers.dense.lane_set import LaneSet, StepAborted, StepUnsendable
from workers.dense.members import AttentionMember, Connect
from workers.dense.metrics import DenseMetrics
from workers.dense.model import Decoder
from workers.dense.mover import Mover
from workers.dense.pool import Executors, Pool
from workers.dense.sampler import Sampled
from workers.dense.sequence_table import SequenceTable, TableLimits
from workers.dense.sequences import LiveSequence, Submission
from workers.dense.shard_keeper import ShardKeeper
from workers.dense.step_layout import Chunk
from workers.dense.step_runner import StepOutcome, StepRunner
from workers.dense.submissions import OUTPUTS_AT_CERTAIN_PROMPT, Door, Submissions
from workers.dense.windows import WindowTrimmer
from workers.kernels.signature import Kernel
from workers.lanes.messages import Lane

_log = logger("dense.engine")

_OFFERS_MOST = 4096
_CALLS_PER_STEP = 256
_CALLS_BUDGET_S = 0.005
_LAST_CALLS_BUDGET_S = 1.0
_IDLE_S = 1.0
"""Longest pause without work; what is due earlier shortens it."""


class Engine:
    """Everything that happens to sequences happens on this thread, between two steps.

        loop: plan   do what others asked, then let the scheduler decide; shard maps leave
              run    one forward pass; a fault of an attention worker aborts it, nothing counts
              apply  tokens and ends leave, one message per gateway

    Methods may be called from any thread; they hand over and return. It is also the pool's listener.
    """

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        kernel: Kernel,
        connect: Connect,
        clock: Clock = monotonic,
        on_step: Callable[[StepOutcome], None] | None = None,
        serves: Serves = "both",
        find: Find | None = None,
        executors: Executors = ThreadPoolExecutor,
    ) -> None:
        """`connect` makes the peers of attention workers; `kernel` attends chunks over themselves; `on_step`
        is told of each step on the engine's thread, before its tokens leave. One that serves "prefill" gives
        new sequences away as soon as their prompt is certain. `find` asks the directory for prefixes;
        `executors` run the pool's calls.
        """
        self._on_step = on_step
        self._serves = serves
        self.metrics = DenseMetrics(config.model.served_name)
        self.failed: Future[str] = Future()
        """The name of the exception that ended its thread, if one did: what it held is left as by a death."""
        self.max_sequence_length = min(
            config.model.max_sequence_length or decoder.spec.max_sequence_length,
            decoder.spec.max_sequence_length,
        )
        self._eos_token_ids = decoder.spec.eos_token_ids
        self._inbox = Inbox(_OFFERS_MOST, clock)
        self._outbox = Outbox()
        self._lanes = LaneSet(config.lanes)
        self._micro_batches = MicroBatches(config.dense.micro_batches)
        pace = DensePace.of(config, decoder.spec.layers)
        self._runner = StepRunner(decoder, kernel, self._lanes, self._micro_batches, pace)
        limits = scheduler_limits(config, self.max_sequence_length, decoder.spec.window_tokens)
        self._scheduler = Scheduler(limits)
        policy, lease_ms = placement_policy(config), config.attention.lease_ms
        self.pool = Pool(policy, connect, self, lease_ms, find, clock, executors)
        table_limits = TableLimits(config.dense.max_finished, config.dense.orphan_grace_ms / 1000)
        self._table = SequenceTable(table_limits, self._scheduler, self.pool, self._outbox, clock)
        self._door = Door(
            self.metrics,
            self._table,
            self._scheduler,
            self.pool,
            self._outbox,
            clock,
            self._inbox.post,
            self._lanes.leads_to,
            decoder.spec.geometry(config.model.dtype, config.attention.block_tokens),
        )
        index = PrefixIndex() if config.attention.prefix_sharing else None
        self._submissions = Submissions(self._door, config.dense.max_waiting, index)
        self._keeper = ShardKeeper(self._door)
        self._mover = Mover(self._door, config.placement.move_tokens, config.placement.max_shards // 2)
        self._trimmer = WindowTrimmer(self._door, decoder.spec.window_tokens, self._mover.is_moving)
        self._clock = clock
        self._step = 0
        self._stopping = False
        self._told_full: set[WorkerId] = set()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self.metrics.read_gauges(
            lambda: self.sequences_running, lambda: self.sequences_waiting, self.pool.members.used_share
        )

    @property
    def sequences_running(self) -> int:
        """Sequences that take steps."""
        return self._scheduler.running

    @property
    def sequences_waiting(self) -> int:
        """Sequences queued."""
        return self._scheduler.waiting

    @property
    def waiting_tokens(self) -> int:
        """Room that queued sequences ask for."""
        return self._scheduler.waiting_tokens

    def step_times(self) -> tuple[Line, Line] | None:
        """What steps take: dense work by rows, attention by tokens of context; None before that is known."""
        return self._micro_batches.lines()

    def start(self) -> None:
        """Connect to the pool and serve."""
        self.pool.start()
        self._thread.start()

    def stop(self) -> None:
        """Hand all sequences back and end. Idempotent."""
        self._stopping = True
        self._inbox.post(lambda: None)
        if self._thread.is_alive():
            self._thread.join()
        self.pool.close()
        self._lanes.close()

    def submit(self, submission: Submission, subscriber: Subscriber, timeout_s: float) -> None:
        """Hand over a checked submission. Raises Unavailable while the engine does not keep up."""
        self._inbox.offer(lambda: self._submissions.submit(submission, subscriber), timeout_s)

    def abort(self, key: SequenceKey, generation: int, timeout_s: float) -> None:
        """End a sequence and free its blocks."""
        self._inbox.offer(lambda: self._table.abort(key, generation), timeout_s)

    def acknowledge(self, key: SequenceKey, generation: int, timeout_s: float) -> None:
        """The gateway has a finished sequence's end."""
        self._inbox.offer(lambda: self._table.acknowledge(key, generation), timeout_s)

    def move(self, key: SequenceKey, source: WorkerId, target: WorkerId, tokens: int | None = None) -> None:
        """Move a sequence's first shard on `source`, or its first `tokens`, to `target`, while it goes on."""
        self._inbox.post(lambda: self._mover.start(key, source, target, tokens))

    def disconnect(self, subscriber: Subscriber) -> None:
        """A gateway's stream is over."""
        self._inbox.post(lambda: self._table.disconnect(subscriber))

    def refuse_new(self) -> None:
        """Drain: submissions are answered Unavailable from now on."""
        self._submissions.draining = True

    def hand_over(
        self,
        keys: Sequence[SequenceKey],
        target: WorkerId | None,
        answer: Callable[[list[SequenceKey]], None],
    ) -> None:
        """Give live sequences to another dense worker, `target` or any; `answer` gets those that lived here,
        on the engine's thread.
        """

        def hand_over() -> None:
            living = [sequence for key in keys if (sequence := self._table.live(key)) is not None]
            for sequence in living:
                self._table.hand_over(sequence, Handoff(True, target))
            answer([sequence.key for sequence in living])

        self._inbox.post(hand_over)

    def is_idle(self) -> bool:
        """Whether no sequence lives here."""
        return len(self._table) == 0

    def peer_ready(self, member: AttentionMember, lane: Lane) -> None:
        """See `PoolListener`."""

        def ready() -> None:
            self._lanes.add(member.worker, member.epoch, lane, is_local=member.is_local)
            self._keeper.ask_again()

        self._inbox.post(ready)

    def peer_gone(self, worker: WorkerId, epoch: Epoch) -> None:
        """See `PoolListener`."""
        self._lanes.interrupt(worker, epoch)
        self._inbox.post(lambda: self._drop_lane(worker, epoch))

    def lease_lost(self, key: SequenceKey, worker: WorkerId, generation: Generation) -> None:
        """See `PoolListener`."""
        self._inbox.post(lambda: self._keeper.lease_lost(key, worker, generation))

    def superseded(self, key: SequenceKey, generation: Generation, error: Fenced) -> None:
        """See `PoolListener`."""
        self._inbox.post(lambda: self._keeper.superseded(key, generation, error))

    def leads_to(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether a lane to this life of a worker is open."""
        return self._lanes.leads_to(worker, epoch)

    def turn(self) -> bool:
        """One pass of the loop; whether there was something to compute. For the engine's thread, or for
        whoever keeps the clock in its place.
        """
        plan = self._plan()
        if not plan.rows:
            return False
        outcome = self._run(plan)
        if outcome is not None:
            reach("append-apply")
            self._apply(plan, outcome)
        return True

    def leave(self) -> None:
        """The last pass: every sequence goes back to its gateway."""
        self._inbox.run(_OFFERS_MOST, _LAST_CALLS_BUDGET_S)
        self._table.hand_over_all()
        self._outbox.flush(self._step)
        self._runner.tell()

    def _loop(self) -> None:
        try:
            while not self._stopping:
                if not self.turn():
                    self._runner.rest()
                    self._inbox.wait(self._pause_s())
            self.leave()
        except Exception as error:  # noqa: BLE001  whoever waits for the engine must hear of its end
            _log.error("engine_failed", error=error, step=self._step)
            self.failed.set_result(type(error).__name__)

    def _plan(self) -> StepPlan:
        """What the next step does; maps and refusals leave before it."""
        self._inbox.run(_CALLS_PER_STEP, _CALLS_BUDGET_S)
        self._table.expire_orphans()
        self._submissions.release_followers()
        self._mover.tick()
        plan = self._scheduler.plan(self._clock())
        self._step = plan.step
        self._keeper.carry_out(plan)
        self._outbox.flush(plan.step)
        return plan

    def _run(self, plan: StepPlan) -> StepOutcome | None:
        """One forward pass; None when a fault ended it."""
        try:
            outcome = self._runner.run(plan.step, self._chunks(plan))
        except StepAborted as aborted:
            self._recover(aborted)
            return None
        except StepUnsendable as unsendable:
            self._end_step(plan, unsendable)
            return None
        self._told_full.clear()
        return outcome

    def _apply(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Take over what the step brought, and send it."""
        if self._on_step is not None:
            self._on_step(outcome)
        self._time(outcome)
        tokens: dict[SequenceKey, int] = {}
        ended: list[Callable[[], None]] = []
        for chunk, sampled in outcome.sampled:
            end = self._take(chunk.sequence, sampled)
            if end is None:
                tokens[chunk.sequence.key] = 1
            else:
                ended.append(end)
        self._scheduler.apply(plan, tokens)
        for end in ended:
            end()
        if self._serves == "prefill":
            self._give_away(outcome)
        self._trimmer.trim(outcome.chunks)
        self._outbox.flush(plan.step)
        self.metrics.note_step(plan.tokens, len(tokens), outcome.micro_batches, outcome.times)

    def _chunks(self, plan: StepPlan) -> list[Chunk]:
        chunks: list[Chunk] = []
        offset = 0
        for row in plan.rows:
            sequence = self._table.live(row.key)
            assert sequence is not None, f"{row.key} is scheduled, so it lives"
            if sequence.stopwatch.admitted_s is None:
                sequence.stopwatch.admitted_s = self._clock()
            chunks.append(Chunk(sequence, row.start, row.count, row.samples, offset))
            offset += row.count
        return chunks

    def _take(self, sequence: LiveSequence, sampled: Sampled | Internal) -> Callable[[], None] | None:
        """Add a token, or say how the sequence ends. An end token is not delivered."""
        if isinstance(sampled, Internal):
            return lambda: self._table.fail(sequence, sampled)
        if sequence.stopwatch.first_token_s is None:
            sequence.stopwatch.first_token_s = self._clock()
        token_id = sampled.token_id
        if sequence.submission.sampling.ends(token_id, self._eos_token_ids):
            return lambda: self._finish(sequence, FinishReason.STOP, matched_token_id=token_id)
        sequence.append(token_id)
        if sequence.is_complete:
            return lambda: self._finish(sequence, FinishReason.LENGTH, [sampled])
        if sequence.output_count == 1:
            self._submissions.remember(sequence)
        timings = sequence.stopwatch.read(self._clock())
        self._outbox.put(sequence.subscriber, sequence.delta([sampled], timings=timings))
        return None

    def _give_away(self, outcome: StepOutcome) -> None:
        """Sequences whose prompt is certain go to a worker that decodes. One that came with tokens was given
        away before, and came back because there is no such worker.
        """
        for chunk in outcome.chunks:
            sequence = chunk.sequence
            has_prompt = sequence.output_count >= OUTPUTS_AT_CERTAIN_PROMPT
            if has_prompt and not sequence.submission.output and self._table.is_live(sequence):
                self._table.hand_over(sequence, Handoff(worker_stays=True))

    def _finish(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        tokens: Sequence[Sampled] = (),
        matched_token_id: int | None = None,
    ) -> None:
        self._submissions.remember(sequence)
        self._table.finish(sequence, reason, tokens, matched_token_id)

    def _time(self, outcome: StepOutcome) -> None:
        times = outcome.times
        for chunk in outcome.chunks:
            stopwatch = chunk.sequence.stopwatch
            stopwatch.dense_seconds += times.dense_s
            stopwatch.attention_seconds += times.attention_s
            stopwatch.lane_seconds += times.lane_s
            stopwatch.waited_seconds += times.waited_s

    def _recover(self, aborted: StepAborted) -> None:
        """The step counts for nothing and is repeated without what was lost; writes overwrite (DESIGN 6b)."""
        worker, cause = aborted.worker, aborted.cause
        _log.warning("step_aborted", step=self._step, peer=worker, reason=cause.reason, problem=cause.message)
        self.metrics.steps_aborted.inc()
        self._lanes.forget(worker)
        if isinstance(cause, NeedFull) and worker not in self._told_full:
            self._told_full.add(worker)
        elif not (isinstance(cause, Fenced) and self._keeper.lose_shards_of(aborted)):
            epoch = self._lanes.epoch(worker)
            self._drop_lane(worker, epoch)
            self.pool.broken(worker, epoch)

    def _end_step(self, plan: StepPlan, unsendable: StepUnsendable) -> None:
        """A step that cannot be told to a worker could not be the next time either: its sequences end."""
        worker, problem = unsendable.worker, unsendable.cause.message
        _log.error("step_unsendable", step=plan.step, peer=worker, problem=problem)
        self._lanes.forget(worker)
        for row in plan.rows:
            sequence = self._table.live(row.key)
            if sequence is not None:
                self._table.fail(sequence, Internal(f"a step could not be sent to {worker}: {problem}"))

    def _drop_lane(self, worker: WorkerId, epoch: Epoch) -> None:
        """A life of a worker is over or out of reach, and all shards there with it."""
        if self._lanes.leads_to(worker, epoch):
            self._lanes.drop(worker)
            self._keeper.lose_worker(worker)

    def _pause_s(self) -> float:
        """Until something is due by itself."""
        return max(0.0, min(_IDLE_S, self._scheduler.due_s() - self._clock()))
