"""The open lanes of one dense worker, one per life of an attention worker. Used by the engine's thread, but
for `interrupt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from cluster.config import LaneConfig
from cluster.errors import AnabranchError, InvalidRequest
from cluster.types import Epoch, WorkerId
from workers.lanes.messages import Lane, LayerMessage, PartialReply, PlanRow, StepPlanDifference
from workers.lanes.plans import PlanEncoder

_PREDICTED_MOST_MS = 180_000
"""Of what is predicted, for the slowest of machines: a worker that hangs stops steps for minutes at most."""

_ALLOWANCE_MOST_MS = 600_000
"""Of a reply in all, whatever is configured: a frame's field holds no more than 32 bits."""


class StepAborted(Exception):
    """A worker could not serve its part of a step; nothing of the step counts.

    Not of the tree: it never leaves the engine. `cause` is what the worker or its lane said.
    """

    def __init__(self, worker: WorkerId, cause: AnabranchError) -> None:
        super().__init__(f"{worker}: {cause.message}")
        self.worker = worker
        self.cause = cause


class StepUnsendable(Exception):
    """A message of a step does not fit a lane, which is a bug here: the worker is well, and repeating is no
    use. Not of the tree, likewise.
    """

    def __init__(self, worker: WorkerId, cause: InvalidRequest) -> None:
        super().__init__(f"{worker}: {cause.message}")
        self.worker = worker
        self.cause = cause


@dataclass(slots=True)
class _Open:
    epoch: Epoch
    lane: Lane
    is_local: bool
    encoder: PlanEncoder = field(default_factory=PlanEncoder)


class LaneSet:
    """Sends messages and awaits replies by worker name; every error names the worker it is about."""

    def __init__(self, config: LaneConfig) -> None:
        self._config = config
        self._open: dict[WorkerId, _Open] = {}

    def add(self, worker: WorkerId, epoch: Epoch, lane: Lane, *, is_local: bool = False) -> None:
        """Use a new lane; closes an older one to the same worker."""
        self.drop(worker)
        self._open[worker] = _Open(epoch, lane, is_local)

    def drop(self, worker: WorkerId) -> None:
        """Close the lane to a worker, if there is one."""
        opened = self._open.pop(worker, None)
        if opened is not None:
            opened.lane.close()

    def interrupt(self, worker: WorkerId, epoch: Epoch) -> None:
        """A life of a worker is over: a step that waits for it is aborted now. For other threads."""
        opened = self._open.get(worker)
        if opened is not None and opened.epoch == epoch:
            opened.lane.shut_down()

    def close(self) -> None:
        """Close all lanes."""
        for worker in tuple(self._open):
            self.drop(worker)

    def leads_to(self, worker: WorkerId, epoch: Epoch) -> bool:
        """Whether there is a lane to this life of a worker."""
        opened = self._open.get(worker)
        return opened is not None and opened.epoch == epoch

    def epoch(self, worker: WorkerId) -> Epoch:
        """The life an open lane leads to."""
        return self._open[worker].epoch

    def in_sending_order(self, workers: Iterable[WorkerId]) -> list[WorkerId]:
        """By name, a local one last: its lane computes while it is sent to, the others meanwhile."""
        return sorted(workers, key=lambda worker: (self._open[worker].is_local, worker))

    def is_local(self, worker: WorkerId) -> bool:
        """Whether the worker attends in this process, on this thread."""
        return self._open[worker].is_local

    def forget(self, worker: WorkerId) -> None:
        """Send the worker's next plans whole: it may not hold the bases of differences."""
        opened = self._open.get(worker)
        if opened is not None:
            opened.encoder = PlanEncoder()

    def encode(
        self, worker: WorkerId, step: int, micro_batch: int, rows: Sequence[PlanRow], *, whole: bool
    ) -> StepPlanDifference:
        """The plan of a step for one worker, as a difference unless `whole`."""
        encoder = self._open[worker].encoder
        if whole:
            encoder.forget(micro_batch)
        return encoder.encode(step, micro_batch, rows)

    def send(self, worker: WorkerId, message: LayerMessage) -> None:
        """Raises StepAborted, and StepUnsendable for a message that no lane carries."""
        try:
            self._open[worker].lane.send(message)
        except InvalidRequest as error:
            raise StepUnsendable(worker, error) from error
        except AnabranchError as error:
            raise StepAborted(worker, error) from error

    def receive(
        self, worker: WorkerId, step: int, micro_batch: int, layer: int, deadline_s: float
    ) -> PartialReply:
        """Raises StepAborted."""
        try:
            return self._open[worker].lane.receive(step, micro_batch, layer, deadline_s)
        except AnabranchError as error:
            raise StepAborted(worker, error) from error

    def allowance_ms(self, predicted_s: float) -> int:
        """Time a reply may take: a floor plus a multiple of what is predicted (DESIGN 6b, Lanes)."""
        predicted_ms = min(int(1000 * self._config.deadline_factor * predicted_s), _PREDICTED_MOST_MS)
        return min(self._config.deadline_floor_ms + predicted_ms, _ALLOWANCE_MOST_MS)


def deadline_of(message: LayerMessage) -> float:
    """The monotonic time by which the reply to a message sent now is due."""
    return monotonic() + message.deadline_ms / 1000
