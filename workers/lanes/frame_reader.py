"""Frames out of a byte stream, whatever pieces it comes in, without a copy where a piece is a frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.lanes import frames
from workers.lanes.frames import HEADER_BYTES, TRAILER_BYTES, FrameHeader, ReceivedBytes

_BYTES_AT_FIRST = 2**16
_VIEWS_MOST = 64

FrameShape = tuple[int, int, tuple[int, int, int, int]]
"""Kind, flags and section lengths: all that the views of a frame depend on."""


@dataclass(slots=True, eq=False)
class FrameMemory:
    """Memory that holds one frame at a time, and the views made of it so far: frames of a step have few
    shapes, and a view of a tensor costs as much as receiving it.
    """

    tensor: Tensor
    raw: ReceivedBytes
    header: ReceivedBytes
    whole: memoryview
    _payloads: dict[int, ReceivedBytes] = field(default_factory=dict)
    _views: dict[FrameShape, tuple[Tensor, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, size: int) -> FrameMemory:
        """Fresh memory; torch aligns it for any element type."""
        tensor = torch.empty(max(size, HEADER_BYTES), dtype=torch.uint8)
        raw: ReceivedBytes = tensor.numpy()
        return cls(tensor, raw, raw[:HEADER_BYTES], raw.data)

    def payload(self, size: int) -> ReceivedBytes:
        """The first `size` bytes after the header."""
        found = self._payloads.get(size)
        if found is None:
            if len(self._payloads) >= _VIEWS_MOST:
                self._payloads.clear()
            found = self._payloads[size] = self.raw[HEADER_BYTES : HEADER_BYTES + size]
        return found

    def views(self, shape: FrameShape) -> tuple[Tensor, ...] | None:
        """The tensors a frame of this shape was read as, if one was."""
        return self._views.get(shape)

    def keep_views(self, shape: FrameShape, tensors: tuple[Tensor, ...]) -> None:
        """Remember the tensors of a frame of this shape."""
        if len(self._views) >= _VIEWS_MOST:
            self._views.clear()
        self._views[shape] = tensors


@dataclass(slots=True, eq=False)
class Frame:
    """A frame that checked. Its memory is the reader's: see `FrameReader.next`."""

    header: FrameHeader
    memory: FrameMemory

    @property
    def payload(self) -> ReceivedBytes:
        """Everything after the header."""
        return self.memory.payload(self.header.payload_bytes)


class FrameReader:
    """Says where the next bytes belong, and gives each frame once it is whole and has checked.

        wanted() --bytes come--> received(count) --> next() until it gives None; again

    A read may bring more than one frame, or the beginning of another: what follows a frame moves to the
    memory the next one is read into. Each micro-batch has memory of its own, which is exchanged with the
    incoming one when a frame of it is whole, so that nothing else is ever copied.
    """

    def __init__(self, read_header: frames.HeaderReader) -> None:
        """`read_header` checks a header's identity and limits, and raises for one that must not be here."""
        self._read_header = read_header
        self._incoming = FrameMemory.of(_BYTES_AT_FIRST)
        self._kept: dict[int, FrameMemory] = {}
        self._header: FrameHeader | None = None
        self._frame_bytes = HEADER_BYTES
        self._filled = 0
        self._checksum = self._checked = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether no byte of the next frame has come."""
        return self._filled == 0

    def wanted(self) -> memoryview:
        """The memory that takes the next bytes; never empty."""
        return self._incoming.whole[self._filled :] if self._filled else self._incoming.whole

    def received(self, count: int) -> None:
        """`count` bytes were written into `wanted()`."""
        self._filled += count

    def next(self) -> Frame | None:
        """The next whole frame, if there is one; its memory is good until the next frame of its micro-batch.

        Raises LaneBroken, Fenced or VersionMismatch; the stream is of no use afterwards.
        """
        header = self._header
        if header is None:
            if self._filled < HEADER_BYTES:
                return None
            header = self._begin(self._read_header(self._incoming.header))
        if self._filled < self._frame_bytes:
            self._check_so_far(self._filled)
            return None
        frame = Frame(header, self._incoming)
        self._check(frame)
        self._exchange(header.micro_batch)
        return frame

    def _begin(self, header: FrameHeader) -> FrameHeader:
        """Make room for a frame whose header has checked."""
        self._header = header
        self._frame_bytes = HEADER_BYTES + header.payload_bytes + TRAILER_BYTES
        if self._frame_bytes > len(self._incoming.raw):
            self._incoming = _copied(self._incoming.raw[: self._filled], self._frame_bytes)
        return header

    def _check_so_far(self, filled: int) -> None:
        """Sum up what came of a large frame's sections while the rest is on its way."""
        begin, end = self._checked or HEADER_BYTES, min(filled, self._frame_bytes - TRAILER_BYTES)
        self._checksum = frames.extend_checksum(self._checksum, self._incoming.raw[begin:end])
        self._checked = end

    def _check(self, frame: Frame) -> None:
        """Raise LaneBroken unless the sections are what was sent."""
        if self._checked:
            self._check_so_far(self._frame_bytes)
            checksum = self._checksum
        else:
            checksum = frames.extend_checksum(0, frame.payload)
        trailer = self._incoming.raw[self._frame_bytes - TRAILER_BYTES : self._frame_bytes]
        frames.check_payload(frame.header, checksum, trailer.tobytes())

    def _exchange(self, micro_batch: int) -> None:
        """The frame keeps its memory; its micro-batch's old one takes what came after the frame."""
        memory, left = self._incoming, self._filled - self._frame_bytes
        spare = self._kept.get(micro_batch)
        if spare is None or len(spare.raw) < max(left, HEADER_BYTES):
            spare = FrameMemory.of(len(memory.raw))
        if left:
            spare.raw[:left] = memory.raw[self._frame_bytes : self._filled]
        self._kept[micro_batch], self._incoming = memory, spare
        self._header, self._frame_bytes, self._filled = None, HEADER_BYTES, left
        self._checksum = self._checked = 0


def _copied(filled: ReceivedBytes, size: int) -> FrameMemory:
    memory = FrameMemory.of(size)
    memory.raw[: len(filled)] = filled
    return memory
