"""The lane within one process: tensors are handed over, nothing is copied."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import AnabranchError, LaneBroken
from workers.lanes.answer import answer
from workers.lanes.messages import LaneHandler, LayerMessage, PartialReply
from workers.lanes.replies import ReplySlots


class InProcessLane:
    """Calls the handler in `send`, on the dense worker's thread; `receive` gives the outcome.

    Send to remote workers first: they then compute while this process does.
    """

    def __init__(self, handler: LaneHandler, on_close: Callable[[], None]) -> None:
        self._handler = handler
        self._on_close = on_close
        self._slots = ReplySlots()
        self._closed = False
        self.bytes_sent = 0
        self.bytes_received = 0

    def send(self, message: LayerMessage) -> None:
        """Attend or append now. Raises LaneBroken after `close`."""
        if self._closed:
            raise LaneBroken("the lane is closed")
        outcome = answer(self._handler, message)
        if outcome is not None:
            self._slots.put((message.step, message.micro_batch, message.layer), outcome)

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:  # noqa: ARG002
        """The reply, which is there already. Raises what the handler raised, or LaneBroken."""
        outcome = self._slots.take((step, micro_batch, layer))
        if outcome is None:
            raise LaneBroken(f"no query of step {step}, micro-batch {micro_batch}, layer {layer} was sent")
        if isinstance(outcome, AnabranchError):
            raise outcome
        return outcome

    def shut_down(self) -> None:
        """See `Lane.shut_down`. Nobody waits here: the worker attends on the thread that sends."""

    def close(self) -> None:
        """End the lane. Idempotent."""
        if not self._closed:
            self._closed = True
            self._on_close()
