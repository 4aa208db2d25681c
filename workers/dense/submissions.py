"""How sequences enter: new ones, resubmitted ones, and those taken over. Used by the engine's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from cluster.clock import Clock
from cluster.errors import AlreadyExists, AnabranchError, Fenced, ResourceExhausted, Unavailable
from cluster.policies.prefixes import PrefixIndex, Source, sources_of
from cluster.policies.ranges import Range
from cluster.policies.scheduler import Scheduler
from cluster.telemetry import logger
from cluster.types import Epoch, KvGeometry, SequenceKey, WorkerId
from workers.dense.deltas import Delta, FinishReason, Outbox, Subscriber
from workers.dense.metrics import DenseMetrics
from workers.dense.pool import Pool
from workers.dense.rooms import Adopted, PrefixWanted
from workers.dense.sampler import Sampled
from workers.dense.sequence_table import SequenceTable
from workers.dense.sequences import LiveSequence, Submission

_log = logger("dense.submissions")

OUTPUTS_AT_CERTAIN_PROMPT = 2
"""The step that computes the first output token's KV makes certain what was written before it."""


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
    geometry: KvGeometry

    def lose(self, sequence: LiveSequence, ranges: Sequence[Range]) -> bool:
        """KV of these ranges, which have left the map, is gone. True: a hole needs what has expired, so the
        sequence gives up all it has and begins anew.
        """
        begins_anew = self.scheduler.lost(sequence.key, ranges)
        if begins_anew:
            sequence.begin_anew()
            self.pool.release(sequence.key)
        else:
            self.let_expire(sequence, self.scheduler.expired_before(sequence.key))
        return begins_anew

    def let_expire(self, sequence: LiveSequence, position: int) -> None:
        """What lies before a position that no row will see leaves the map (in whole blocks), the gateway is
        sent the new one, and then the workers are told.
        """
        workers = sequence.drop_before(position)
        if workers:
            self.outbox.put(sequence.subscriber, sequence.delta(with_map=True))
            self.post(partial(self.pool.trim, sequence.key, workers, sequence.first_kept))


class Submissions:
    """Takes sequences in, or answers why not.

    A resubmitted sequence first adopts what lies in the pool, which also fences whoever ran it before. A new
    one acquires what lies there of its prefix; the further choices of a request wait for the first, whose
    prompt is theirs. Then it is scheduled with what was found, which costs no computation.
    """

    def __init__(self, door: Door, max_waiting: int, index: PrefixIndex | None) -> None:
        """Without an `index` no sequence shares anything with another."""
        self.draining = False
        self._door = door
        self._max_waiting = max_waiting
        self._index = index
        self._looking: set[LiveSequence] = set()
        """Live, but not scheduled yet: the pool is asked, or their leader computes the prompt."""
        self._followers: dict[LiveSequence, list[LiveSequence]] = {}

    def submit(self, submission: Submission, subscriber: Subscriber) -> None:
        """Admit a checked submission; a refusal is answered as the sequence's failure."""
        try:
            before = self._admissible(submission)
        except AnabranchError as error:
            self.refuse(submission, subscriber, error)
            return
        now_s = self._door.clock()
        sequence = LiveSequence.of(submission, subscriber, now_s, self._door.geometry)
        if before is not None:
            self._take_over(before, sequence)
        self._door.table.admit(sequence)
        if sequence.is_complete:
            self._door.table.finish(sequence, FinishReason.LENGTH)
        elif submission.is_resumed or before is not None:
            self._adopt(sequence, before)
        else:
            self._begin(sequence)

    def remember(self, sequence: LiveSequence) -> None:
        """What was computed of a sequence so far may serve others: note where its blocks lie."""
        if self._index is not None:
            sequence.chain.grow(sequence.token_ids)
            self._index.remember(sequence.chain, sequence.shard_map())

    def release_followers(self) -> None:
        """Choices that waited for the first one of their request go on once its prompt is certain, or it is
        gone.
        """
        for leader in [leader for leader in self._followers if not self._is_expected(leader)]:
            for sequence in self._followers.pop(leader):
                self._looking.discard(sequence)
                if self._door.table.is_live(sequence):
                    self._follow(sequence, leader)

    def refuse(self, submission: Submission, subscriber: Subscriber, error: AnabranchError) -> None:
        """Answer a submission with its failure."""
        key, count = submission.key, len(submission.output)
        self._door.outbox.put(subscriber, Delta(key, submission.generation, count, failure=error))
        _log.info("refused", request_id=key.request_id, choice=key.choice, problem=error.message)

    def _admissible(self, submission: Submission) -> LiveSequence | None:
        """The sequence whose place this takes, if any.

        One that ran already fitted then: where workers are missing now it waits for them, until its deadline
        (see `ShardKeeper`). Raises AlreadyExists, Unavailable, ResourceExhausted.
        """
        before = self._door.table.known(submission.key)
        if before is not None and submission.generation <= before.submission.generation:
            raise AlreadyExists(
                f"request {submission.key.request_id} is live here under generation "
                f"{before.submission.generation}; resubmit under a higher one, or choose another id"
            )
        if self.draining:
            raise Unavailable("the dense worker is draining: submit to another one")
        if self._door.scheduler.waiting + len(self._looking) >= self._max_waiting:
            raise ResourceExhausted(
                f"{self._max_waiting} sequences wait (dense.max_waiting): retry later or elsewhere"
            )
        if not self._door.pool.members.spaces(1, usable=False):
            raise Unavailable("no attention worker has joined: retry later")
        reason = self._door.pool.inadmissible(len(submission.prompt) + submission.max_tokens)
        if reason is not None and before is None and not submission.is_resumed:
            raise ResourceExhausted(f"{reason}; if one is only being restarted, retry later")
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
            timings = sequence.stopwatch.read(self._door.clock())
            self._door.outbox.put(sequence.subscriber, sequence.delta(tokens, timings=timings))

    def _begin(self, sequence: LiveSequence) -> None:
        """A new sequence: with whatever lies in the pool of its prefix."""
        if self._index is None:
            self._schedule(sequence, Adopted())
            return
        leader = self._leader(sequence)
        if leader is not None and self._is_expected(leader):
            self._looking.add(sequence)
            self._followers.setdefault(leader, []).append(sequence)
        elif leader is not None:
            self._follow(sequence, leader)
        else:
            sequence.chain.grow(sequence.token_ids[:-1])
            sources = self._index.sources(sequence.chain, self._door.leads_to)
            may_ask = bool(sequence.chain.hashes) and self._door.pool.can_ask
            self._acquire(sequence, sources, asks=may_ask)

    def _follow(self, sequence: LiveSequence, leader: LiveSequence) -> None:
        """Go on behind the leader's prompt; where it lost that meanwhile, with whatever lies in the pool."""
        sequence.chain.begin_as(leader.chain, len(sequence.token_ids) - 1)
        sources = sources_of(leader.shard_map())
        if not sources and self._index is not None:
            sources = self._index.sources(sequence.chain, self._door.leads_to)
        self._acquire(sequence, sources)

    def _leader(self, sequence: LiveSequence) -> LiveSequence | None:
        """The first choice of the same request, if it lives here and began with the same prompt."""
        first = self._door.table.live(SequenceKey(sequence.key.request_id))
        if first is None or first is sequence or first.submission.prompt != sequence.submission.prompt:
            return None
        return first

    def _is_expected(self, leader: LiveSequence) -> bool:
        """Whether more of a leader's prompt is on the way: its last chunk is certain after the next step."""
        return self._door.table.is_live(leader) and leader.output_count < OUTPUTS_AT_CERTAIN_PROMPT

    def _acquire(self, sequence: LiveSequence, sources: tuple[Source, ...], *, asks: bool = False) -> None:
        self._door.metrics.prefix_queries.inc(len(sequence.token_ids))
        if not sources and not asks:
            self._schedule(sequence, Adopted())
            return
        sequence.chain.grow(sequence.token_ids[:-1])
        self._looking.add(sequence)
        wanted = PrefixWanted(
            sequence.key, sequence.generation, sequence.chain, tuple(sequence.token_ids[:-1]), sources, asks
        )
        self._door.pool.acquire(
            wanted, lambda answer: self._door.post(partial(self._acquired, sequence, answer))
        )

    def _acquired(self, sequence: LiveSequence, answer: Adopted | AnabranchError) -> None:
        self._looking.discard(sequence)
        if not self._door.table.is_live(sequence):
            return
        if isinstance(answer, AnabranchError):
            self._door.table.fail(sequence, refusal(sequence, answer))
            return
        sequence.cached_tokens = self._schedule(sequence, answer)
        self._door.metrics.prefix_hits.inc(sequence.cached_tokens)

    def _adopt(self, sequence: LiveSequence, before: LiveSequence | None) -> None:
        """Ask the pool for what survives. The last known token is computed in any case, for its logits.

        Of two maps neither need be the newer one: a life here may have gone on where the gateway did not hear
        of it, or another dense worker may have had the sequence since.
        """
        known_map = sequence.submission.shard_map
        if known_map is not None and before is not None:
            known_map = (*known_map, *before.shard_map())
        self._looking.add(sequence)
        self._door.pool.adopt(
            sequence.key,
            sequence.generation,
            tuple(sequence.token_ids[:-1]),
            known_map or None,
            lambda answer: self._door.post(partial(self._adopted, sequence, answer)),
        )

    def _adopted(self, sequence: LiveSequence, answer: Adopted | AnabranchError) -> None:
        self._looking.discard(sequence)
        if not self._door.table.is_live(sequence):
            return
        if isinstance(answer, AnabranchError):
            self._door.table.fail(sequence, answer)
        else:
            self._door.metrics.adopted.inc(self._schedule(sequence, answer))

    def _schedule(self, sequence: LiveSequence, adopted: Adopted) -> int:
        """Queue it with what was found as far as a lane leads there; returns how many tokens that is."""
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
            return 0
        if sequence.orphaned_s is not None:
            self._door.scheduler.hold(sequence.key)
        if pairs:
            sequence.place(placed for placed, _ in pairs)
            self._door.let_expire(sequence, self._door.scheduler.expired_before(sequence.key))
            self._door.outbox.put(sequence.subscriber, sequence.delta(with_map=True))
        found = sum(end - first for _, (first, end) in pairs)
        _log.info(
            "admitted",
            request_id=sequence.key.request_id,
            choice=sequence.key.choice,
            step=self._door.scheduler.step,
            tokens=len(sequence.token_ids),
            found=found,
        )
        return found


def refusal(sequence: LiveSequence, error: AnabranchError) -> AnabranchError:
    """Fenced before it ever held a block means that the id itself was in use a short while ago."""
    if isinstance(error, Fenced) and not sequence.has_held:
        return AlreadyExists(
            f"request id {sequence.key.request_id} was in use a short while ago: choose another one, or wait"
        )
    return error
