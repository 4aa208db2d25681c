"""The dense side of a lane over any byte link."""

from __future__ import annotations

import contextlib
import time

from cluster.errors import AnabranchError, Fenced, LaneBroken
from workers.lanes.codec import FrameCodec
from workers.lanes.frame_reader import Frame, FrameReader
from workers.lanes.frames import FrameKind
from workers.lanes.link import ByteLink
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.replies import ReplySlots

_CLOSE_TIMEOUT_S = 1.0


class FramedLane:
    """A `Lane` over a `ByteLink`; any failure closes it, for nothing after a lost byte can be trusted.

        open --deadline missed, damage, other side gone, close()--> closed

    Each micro-batch has receive memory of its own, reused: a reply's tensors are valid until the next
    message of its micro-batch is sent.
    """

    def __init__(self, link: ByteLink, codec: FrameCodec) -> None:
        self.link = link
        self._codec = codec
        self._reader = FrameReader(codec.read_header)
        self._slots = ReplySlots()
        self._closed = False

    @property
    def bytes_sent(self) -> int:
        """Bytes that left, frames' headers included."""
        return self.link.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes that came, frames' headers included."""
        return self.link.bytes_received

    def send(self, message: LayerMessage) -> None:
        """See `Lane.send`; the bytes are with the transport within the message's deadline."""
        self._check_open()
        packed = self._codec.pack_message(message)
        try:
            deadline_s = time.monotonic() + message.deadline_ms / 1000
            for buffers in packed:
                self.link.write(buffers, deadline_s, self._read_waiting)
        except (LaneBroken, Fenced):
            self._end()
            raise

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """See `Lane.receive`."""
        self._check_open()
        place = (step, micro_batch, layer)
        while (outcome := self._slots.take(place)) is None:
            try:
                if not self._read(deadline_s):
                    raise LaneBroken(f"no reply to step {step}, layer {layer} within its deadline")
            except (LaneBroken, Fenced):
                self._end()
                raise
        if isinstance(outcome, AnabranchError):
            raise outcome
        return outcome

    def shut_down(self) -> None:
        """See `Lane.shut_down`."""
        self.link.shut_down()

    def close(self) -> None:
        """Say goodbye, let the other side finish what was sent (for a second), end the lane. Idempotent."""
        if self._closed:
            return
        deadline_s = time.monotonic() + _CLOSE_TIMEOUT_S
        # The other side's end of the connection arrives as LaneBroken, and is the answer to a goodbye.
        with contextlib.suppress(LaneBroken, Fenced):
            for buffers in self._codec.pack_close():
                self.link.write(buffers, deadline_s, self._read_waiting)
            while self._read(deadline_s):
                continue
        self._end()

    def _check_open(self) -> None:
        if self._closed:
            raise LaneBroken("the lane is closed")

    def _end(self) -> None:
        self._closed = True
        self.link.close()

    def _read_waiting(self) -> None:
        """Take what has arrived, without waiting."""
        self._read(time.monotonic())

    def _read(self, deadline_s: float) -> bool:
        """Read once; False when nothing came by the deadline."""
        count = self.link.read_into(self._reader.wanted(), deadline_s)
        self._reader.received(count)
        while (frame := self._reader.next()) is not None:
            self._keep(frame)
        return count > 0

    def _keep(self, frame: Frame) -> None:
        header = frame.header
        if header.kind is FrameKind.PARTIAL:
            outcome: PartialReply | AnabranchError = self._codec.read_reply(frame)
        elif header.kind is FrameKind.FAULT:
            outcome = self._codec.read_fault(frame)
        elif header.kind is FrameKind.CLOSE:
            raise LaneBroken("the attention worker closed the lane")
        else:
            raise LaneBroken("a STEP arrived at the dense side")
        self._slots.put((header.step, header.micro_batch, header.layer), outcome)
