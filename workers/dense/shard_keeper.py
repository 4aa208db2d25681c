"""Room for live sequences: asked for, granted, lost. Used by the engine's thread."""

from __future__ import annotations

from functools import partial

from cluster.errors import (
    AnabranchError,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
)
from cluster.policies.scheduler import RoomRequest, StepPlan
from cluster.telemetry import logger
from cluster.types import Generation, SequenceKey, WorkerId
from workers.dense.lane_set import StepAborted
from workers.dense.rooms import RoomWanted
from workers.dense.sequences import LiveSequence, Placed
from workers.dense.submissions import Door, refusal

_log = logger("dense.shards")


class ShardKeeper:
    """Carries out what a plan says about room, and keeps scheduler and shard maps of one mind.

    A request that the workers now usable could not grant even if they were empty is parked, not refused:
    a worker died and its successor is on the way. It is asked again when a worker becomes usable.
    """

    def __init__(self, door: Door) -> None:
        self._door = door
        self._parked: list[tuple[LiveSequence, RoomRequest]] = []

    def carry_out(self, plan: StepPlan) -> None:
        """Free what was preempted, end what is over, ask for room."""
        table = self._door.table
        for key in plan.preempted:
            sequence = self._live(key)
            sequence.begin_anew()
            sequence.stopwatch.preemptions += 1
            self._door.pool.release(key)
            self._door.metrics.preemptions.inc()
            _log.info("preempted", request_id=key.request_id, choice=key.choice, step=plan.step)
        for key in plan.expired:
            table.fail(self._live(key), DeadlineExceeded("the request's deadline passed before it was done"))
        for key in plan.exhausted:
            sequence = self._live(key)
            table.fail(
                sequence,
                ResourceExhausted(
                    f"no attention worker has room for token {len(sequence.token_ids)} of the sequence, and "
                    "nothing else here could give way: retry later"
                ),
            )
        for request in plan.room:
            self._ask(self._live(request.key), request)

    def ask_again(self) -> None:
        """A worker became usable: parked requests have a chance."""
        parked, self._parked = self._parked, []
        for sequence, request in parked:
            alive = self._door.table.is_live(sequence)
            if alive and self._door.scheduler.generation(request.key) == request.generation:
                self._ask(sequence, request)

    def lose_worker(self, worker: WorkerId) -> None:
        """All shards on a worker are gone or out of reach."""
        for sequence in self._door.table.holding_at(worker):
            self._lose(sequence, worker)

    def lose_shards_of(self, aborted: StepAborted) -> bool:
        """Shards are not as the plan says, a worker answered: their sequences give up all they have there.

        False when the fault names no shard of a live sequence.
        """
        named = aborted.cause.metadata.get("shards", "").split(",")
        at_fault = [
            sequence
            for sequence in self._door.table.holding_at(aborted.worker)
            if any(
                placed.shard.worker == aborted.worker and str(placed.shard.shard) in named
                for placed in sequence.shards
            )
        ]
        for sequence in at_fault:
            self._lose(sequence, aborted.worker)
        return bool(at_fault)

    def lease_lost(self, key: SequenceKey, worker: WorkerId, generation: Generation) -> None:
        """A worker no longer holds what it held of a sequence under this generation. It may have fenced that
        generation: where nothing was in the map either, what comes there next is a new life's.
        """
        sequence = self._door.table.live(key)
        if sequence is None:
            return
        if any(
            placed.shard.worker == worker and placed.generation == generation for placed in sequence.shards
        ):
            self._lose(sequence, worker)
        elif not sequence.holds_at(worker) and generation == sequence.generation:
            sequence.begin_anew_at(worker)
            self._door.pool.renounce(key, worker, sequence.void[worker])

    def superseded(self, key: SequenceKey, generation: Generation, error: AnabranchError) -> None:
        """Another dense worker runs the sequence; or this one does, where what was fenced is of a submission
        before the one that lives.
        """
        sequence = self._door.table.live(key)
        if sequence is not None and sequence.is_of_submission(generation):
            self._door.table.fail(sequence, error)

    def _live(self, key: SequenceKey) -> LiveSequence:
        sequence = self._door.table.live(key)
        assert sequence is not None, f"{key} is scheduled, so it lives"
        return sequence

    def _ask(self, sequence: LiveSequence, request: RoomRequest) -> None:
        if sequence.is_worn_out:
            self._door.table.fail(sequence, Internal("the sequence had to begin anew 65,536 times"))
            return
        wanted = RoomWanted(
            sequence.key,
            sequence.generation,
            sequence.chain,
            request.first,
            request.end,
            sequence.shards,
        )
        self._door.pool.reserve(
            wanted, lambda answer: self._door.post(partial(self._answered, sequence, request, answer))
        )

    def _answered(
        self, sequence: LiveSequence, request: RoomRequest, answer: tuple[Placed, ...] | AnabranchError
    ) -> None:
        if not self._door.table.is_live(sequence):
            return  # its release was asked for after this reservation, and undid it
        if isinstance(answer, AnabranchError):
            self._door.table.fail(sequence, refusal(sequence, answer))
            return
        usable = [
            placed
            for placed in answer
            if not sequence.is_void(placed) and self._door.leads_to(placed.shard.worker, placed.shard.epoch)
        ]
        if usable:
            self._place(sequence, request, usable)
        elif self._door.pool.has_room_for(sequence.max_length):
            self._door.scheduler.refused(request, self._door.clock())
        else:
            self._parked.append((sequence, request))

    def _place(self, sequence: LiveSequence, request: RoomRequest, granted: list[Placed]) -> None:
        ranges = [(placed.shard.first, placed.shard.end) for placed in granted]
        if self._door.scheduler.granted(request, ranges):
            sequence.place(granted)
            self._door.outbox.put(sequence.subscriber, sequence.delta(with_map=True))

    def _lose(self, sequence: LiveSequence, worker: WorkerId) -> None:
        lost = sequence.lose_worker(worker)
        known = len(sequence.token_ids)
        tokens = sum(max(0, min(placed.shard.end, known) - placed.shard.first) for placed in lost)
        ranges = [(placed.shard.first, placed.shard.end) for placed in lost]
        self._door.pool.renounce(sequence.key, worker, sequence.void[worker])
        if self._door.lose(sequence, ranges):
            tokens = known
        self._door.metrics.recomputed.inc(tokens)
        _log.warning(
            "shards_lost",
            request_id=sequence.key.request_id,
            choice=sequence.key.choice,
            peer=worker,
            tokens=tokens,
        )
