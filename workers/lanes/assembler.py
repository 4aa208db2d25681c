"""Frames out of a byte stream, whatever pieces it comes in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from workers.lanes import frames
from workers.lanes.codec import Frame, FrameCodec
from workers.lanes.frames import Bytes, FrameHeader


class FrameAssembler:
    """Says where the next bytes belong and gives each frame once it is whole and has checked.

        header --complete, checked--> payload --complete, checked--> frame; header again

    `buffer_for` gives the payload's memory, at least `header.payload_bytes` of uint8; it is asked
    after the header's lengths were checked against their limits.
    """

    def __init__(self, codec: FrameCodec, buffer_for: Callable[[FrameHeader], Tensor]) -> None:
        self._codec = codec
        self._buffer_for = buffer_for
        self._header_bytes: Bytes = np.empty(frames.HEADER_BYTES, dtype=np.uint8)
        self._header: FrameHeader | None = None
        self._payload = torch.empty(0, dtype=torch.uint8)
        self._target: Bytes = self._header_bytes
        self._filled = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether no byte of the next frame has come."""
        return self._header is None and self._filled == 0

    def wanted(self) -> memoryview:
        """The memory that takes the next bytes; never empty."""
        return self._target.data[self._filled :]

    def fill(self, count: int) -> Frame | None:
        """Note that `count` bytes were written into `wanted()`; the frame they complete, if any.

        Raises LaneBroken, Fenced or VersionMismatch; the stream is of no use afterwards.
        """
        self._filled += count
        if self._filled < len(self._target):
            return None
        if self._header is None:
            self._header = self._codec.read_header(self._header_bytes)
            self._payload = self._buffer_for(self._header)[: self._header.payload_bytes]
            self._target, self._filled = self._payload.numpy(), 0
            if self._header.payload_bytes:
                return None
        frame = Frame(self._header, self._payload)
        frames.check_payload(frame.header, self._target)
        self._header, self._target, self._filled = None, self._header_bytes, 0
        return frame


class GrowingBuffer:
    """One reused allocation, grown to the largest payload seen; limits were checked by the codec."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __call__(self, header: FrameHeader) -> Tensor:
        """At least `header.payload_bytes` of uint8; overwrites what was there."""
        if len(self._memory) < header.payload_bytes:
            self._memory = torch.empty(header.payload_bytes, dtype=torch.uint8)
        return self._memory
