"""The sequences of one dense worker, from admission to acknowledgement. Used by the engine's thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.errors import AnabranchError, Fenced, Unavailable
from cluster.policies.scheduler import Scheduler
from cluster.telemetry import logger
from cluster.types import SequenceKey, WorkerId
from workers.dense.deltas import FinishReason, Handoff, Outbox, Subscriber
from workers.dense.pool import Pool
from workers.dense.sampler import Sampled
from workers.dense.sequences import LiveSequence

_log = logger("dense.sequences")


@dataclass(frozen=True, slots=True)
class TableLimits:
    """See `DenseConfig` for each."""

    max_finished: int
    orphan_grace_s: float


class SequenceTable:
    """Owns which sequences live here, and how each ends.

        live --its last token--> finished --acknowledged--> gone, blocks freed
          |  --failure, abort--> gone, blocks freed
          |  --handed over, fenced--> gone, blocks left to their next owner or their leases
          +--its gateway's stream breaks--> orphaned: no steps --after a grace period--> gone, likewise

    Finished sequences whose gateway is gone are orphans too.
    """

    def __init__(
        self, limits: TableLimits, scheduler: Scheduler, pool: Pool, outbox: Outbox, clock: Clock
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._pool = pool
        self._outbox = outbox
        self._clock = clock
        self._live: dict[SequenceKey, LiveSequence] = {}
        self._finished: OrderedDict[SequenceKey, LiveSequence] = OrderedDict()
        self._orphans: OrderedDict[SequenceKey, LiveSequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def live(self, key: SequenceKey) -> LiveSequence | None:
        """The live sequence of this key."""
        return self._live.get(key)

    def is_live(self, sequence: LiveSequence) -> bool:
        """Whether this very sequence, not a later one of the same key, still lives."""
        return self._live.get(sequence.key) is sequence

    def known(self, key: SequenceKey) -> LiveSequence | None:
        """The live or finished sequence of this key."""
        return self._live.get(key) or self._finished.get(key)

    def holding_at(self, worker: WorkerId) -> list[LiveSequence]:
        """Live sequences with shards on a worker."""
        return [sequence for sequence in self._live.values() if sequence.holds_at(worker)]

    def admit(self, sequence: LiveSequence) -> None:
        """A new sequence lives."""
        assert self.known(sequence.key) is None
        self._live[sequence.key] = sequence

    def remove(self, sequence: LiveSequence) -> None:
        """A later submission takes a live or finished sequence's place; its blocks stay."""
        self._forget(sequence)

    def finish(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        tokens: Iterable[Sampled] = (),
        matched_token_id: int | None = None,
    ) -> None:
        """The output is complete; `tokens` are its last. Blocks stay until the gateway acknowledges."""
        last = tuple(tokens)
        self._forget(sequence)
        self._finished[sequence.key] = sequence
        if sequence.shards:  # of the last tokens nothing was computed yet, of what lies before everything
            sequence.computed_end = len(sequence.token_ids) - len(last)
        timings = sequence.stopwatch.read(self._clock())
        delta = sequence.delta(last, finish=reason, matched_token_id=matched_token_id, timings=timings)
        self._outbox.put(sequence.subscriber, delta)
        self._tell("finished", sequence.key, reason=reason.name, tokens=sequence.output_count)
        while len(self._finished) > self._limits.max_finished:
            _, oldest = self._finished.popitem(last=False)
            self._orphans.pop(oldest.key, None)
            self._pool.release(oldest.key, oldest.computed_end)

    def fail(self, sequence: LiveSequence, error: AnabranchError) -> None:
        """It cannot go on. Unavailable and Fenced leave the blocks to whoever goes on with it."""
        self._forget(sequence)
        timings = sequence.stopwatch.read(self._clock())
        self._outbox.put(sequence.subscriber, sequence.delta(failure=error, timings=timings))
        self._tell("failed", sequence.key, reason=error.reason, problem=error.message)
        if isinstance(error, (Unavailable, Fenced)):
            self._pool.abandon(sequence.key)
        else:
            self._pool.release(sequence.key)

    def abort(self, key: SequenceKey, generation: int) -> None:
        """Its gateway wants it no more: free at once. An abort of an earlier life is ignored."""
        sequence = self.known(key)
        if sequence is not None and generation >= sequence.submission.generation:
            computed_end = sequence.computed_end or self._scheduler.computed(key)
            self._forget(sequence)
            self._pool.release(key, computed_end)
            self._tell("aborted", key)

    def acknowledge(self, key: SequenceKey, generation: int) -> None:
        """Its gateway has the end: free."""
        sequence = self._finished.get(key)
        if sequence is not None and generation >= sequence.submission.generation:
            self._forget(sequence)
            self._pool.release(key, sequence.computed_end)

    def disconnect(self, subscriber: Subscriber) -> None:
        """A gateway's stream is over: its sequences stop stepping and wait to be taken over."""
        now_s = self._clock()
        for sequence in (*self._live.values(), *self._finished.values()):
            if sequence.subscriber is subscriber and sequence.orphaned_s is None:
                sequence.orphaned_s = now_s
                self._orphans[sequence.key] = sequence
                self._scheduler.hold(sequence.key)

    def expire_orphans(self) -> None:
        """Drop orphans nobody came for. Their blocks are left to their leases: somebody may still come."""
        over_s = self._clock() - self._limits.orphan_grace_s
        while self._orphans:
            sequence = next(iter(self._orphans.values()))
            assert sequence.orphaned_s is not None
            if sequence.orphaned_s > over_s:
                return
            self._forget(sequence)
            self._pool.abandon(sequence.key)
            self._tell("orphan_dropped", sequence.key)

    def hand_over_all(self) -> None:
        """This worker leaves: every live sequence goes back to its gateway, for another dense worker."""
        for sequence in tuple(self._live.values()):
            self.hand_over(sequence, Handoff())

    def hand_over(self, sequence: LiveSequence, handoff: Handoff) -> None:
        """A live sequence goes back to its gateway, for another dense worker, which will find its blocks."""
        self._forget(sequence)
        self._outbox.put(sequence.subscriber, sequence.delta(handoff=handoff))
        self._pool.abandon(sequence.key)
        self._tell("handed_over", sequence.key, target=handoff.target or "")

    def _tell(self, event: str, key: SequenceKey, **fields: object) -> None:
        _log.info(event, request_id=key.request_id, choice=key.choice, step=self._scheduler.step, **fields)

    def _forget(self, sequence: LiveSequence) -> None:
        self._scheduler.finish(sequence.key)
        self._live.pop(sequence.key, None)
        self._finished.pop(sequence.key, None)
        self._orphans.pop(sequence.key, None)
