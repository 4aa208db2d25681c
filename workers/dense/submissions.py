"""How sequences enter: new ones, resubmitted ones, and those taken over. Used by the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.clock import Clock
from cluster.errors import AlreadyExists, AnabranchError, Fenced, ResourceExhausted, Unavailable
from cluster.policies.scheduler import Scheduler
from cluster.telemetry import logger
from cluster.types import Epoch, WorkerId
from workers.dense.deltas import Delta, FinishReason, Outbox, Subscriber
from workers.dense.metrics import DenseMetrics
from workers.dense.pool import Pool
from workers.dense.rooms import Adopted
from workers.dense.sampler import Sampled
from workers.dense.sequence_table import SequenceTable
from workers.dense.sequences import LiveSequence, Submission

_log = logger("dense.submissions")


@dataclass(frozen=True, slots=True)
class Door:
    """What submissions meet: shared parts of the engine. `post` runs a call on the engine's thread,
    `leads_to` says whether a lane to a life of a worker is open.
    """

    metrics: DenseMetrics
    table: SequenceTable
    scheduler: Scheduler
    pool: Pool
    outbox: Outbox
    clock: Clock
    post: Callable[[Callable[[], None]], None]
    leads_to: Callable[[WorkerId, Epoch], bool]


class Submissions:
    """Takes sequences in, or answers why not.

    A resubmitted sequence first adopts what lies in the pool, which also fences whoever ran it before; it is
    scheduled with what was found. What is found costs no computation.
    """

    def __init__(self, door: Door, max_waiting: int) -> None:
        self.draining = False
        self._door = door
        self._max_waiting = max_waiting
        self._adopting: set[LiveSequence] = set()

    def submit(self, submission: Submission, subscriber: Subscriber) -> None:
        """Admit a checked submission; a refusal is answered as the sequence's failure."""
        try:
            before = self._admissible(submission)
        except AnabranchError as error:
            self.refuse(submission, subscriber, error)
            return
        now_s = self._door.clock()
        sequence = LiveSequence.of(submission, subscriber, now_s)
        if before is not None:
            self._take_over(before, sequence)
        self._door.table.admit(sequence)
        if sequence.is_complete:
            self._door.table.finish(sequence, FinishReason.LENGTH)
        elif submission.is_resumed or before is not None:
            self._adopt(sequence, before)
        else:
            self._schedule(sequence, Adopted())

    def refuse(self, submission: Submission, subscriber: Subscriber, error: AnabranchError) -> None:
        """Answer a submission with its failure."""
        key, count = submission.key, len(submission.output)
        self._door.outbox.put(subscriber, Delta(key, submission.generation, count, failure=error))
        _log.info("refused", request_id=key.request_id, choice=key.choice, problem=error.message)

    def _admissible(self, submission: Submission) -> LiveSequence | None:
        """The sequence whose place this takes, if any.

        Raises AlreadyExists, Unavailable, ResourceExhausted.
        """
        before = self._door.table.known(submission.key)
        if before is not None and submission.generation <= before.submission.generation:
            raise AlreadyExists(
                f"request {submission.key.request_id} is live here under generation "
                f"{before.submission.generation}; resubmit under a higher one, or choose another id"
            )
        if self.draining:
            raise Unavailable("the dense worker is draining: submit to another one")
        if self._door.scheduler.waiting + len(self._adopting) >= self._max_waiting:
            raise ResourceExhausted(
                f"{self._max_waiting} sequences wait (dense.max_waiting): retry later or elsewhere"
            )
        if not self._door.pool.members.spaces(1, usable=False):
            raise Unavailable("no attention worker has joined: retry later")
        reason = self._door.pool.inadmissible(len(submission.prompt) + submission.max_tokens)
        if reason is not None:
            raise ResourceExhausted(reason)
        return before

    def _take_over(self, before: LiveSequence, sequence: LiveSequence) -> None:
        """End the earlier life here. Tokens it had beyond the submitted ones are not computed again: they
        are delivered at once (unless log-probabilities are due, which are not kept).
        """
        self._door.table.remove(before)
        if before.subscriber is not sequence.subscriber:
            error = Fenced(f"request {before.key.request_id} was taken over under a higher generation")
            self._door.outbox.put(before.subscriber, before.delta(failure=error))
        count = len(sequence.token_ids)
        is_prefix = before.token_ids[:count] == sequence.token_ids
        same_prompt = before.submission.prompt == sequence.submission.prompt
        if is_prefix and same_prompt and sequence.submission.sampling.logprobs is None:
            self._deliver_again(before.token_ids[count : sequence.max_length], sequence)

    def _deliver_again(self, token_ids: list[int], sequence: LiveSequence) -> None:
        for token_id in token_ids:
            sequence.append(token_id)
        if token_ids:
            tokens = [Sampled(token_id, gap=0.0) for token_id in token_ids]
            self._door.outbox.put(sequence.subscriber, sequence.delta(tokens))

    def _adopt(self, sequence: LiveSequence, before: LiveSequence | None) -> None:
        """Ask the pool for what survives. The last known token is computed in any case, for its logits."""
        known_map = before.shard_map() if before is not None else sequence.submission.shard_map
        self._adopting.add(sequence)
        self._door.pool.adopt(
            sequence.key,
            sequence.generation,
            tuple(sequence.token_ids[:-1]),
            known_map or None,
            lambda answer: self._door.post(partial(self._adopted, sequence, answer)),
        )

    def _adopted(self, sequence: LiveSequence, answer: Adopted | AnabranchError) -> None:
        self._adopting.discard(sequence)
        if not self._door.table.is_live(sequence):
            return
        if isinstance(answer, AnabranchError):
            self._door.table.fail(sequence, answer)
        else:
            self._schedule(sequence, answer)

    def _schedule(self, sequence: LiveSequence, adopted: Adopted) -> None:
        pairs = [
            (placed, committed)
            for placed, committed in zip(adopted.placed, adopted.committed, strict=True)
            if self._door.leads_to(placed.shard.worker, placed.shard.epoch)
        ]
        submission = sequence.submission
        try:
            self._door.scheduler.submit(
                sequence.key,
                len(sequence.token_ids),
                submission.priority,
                submission.deadline_s,
                self._door.clock(),
                max_length=sequence.max_length,
                room=[(placed.shard.first, placed.shard.end) for placed, _ in pairs],
                computed=[committed for _, committed in pairs],
            )
        except AnabranchError as error:
            self._door.table.fail(sequence, error)
            return
        if sequence.orphaned_s is not None:
            self._door.scheduler.hold(sequence.key)
        if pairs:
            sequence.place(placed for placed, _ in pairs)
            self._door.metrics.adopted.inc(sum(end - first for _, (first, end) in pairs))
            self._door.outbox.put(sequence.subscriber, sequence.delta(with_map=True))
