"""Messages to frames and back: which tensor stands in which section, and how long each may be."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.errors import AnabranchError, InvalidRequest, LaneBroken
from cluster.types import KvGeometry
from workers.lanes import frames
from workers.lanes.frame_reader import Frame
from workers.lanes.frames import HEADER_BYTES, Flag, FrameHeader, FrameKind, ReceivedBytes, Section
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.plan_bytes import PLAN_ALIGNMENT, pack_plan, unpack_plan
from workers.lanes.plans import MICRO_BATCHES_MOST

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Plain integers: these are asked for every message, and an enumeration's operators are slow.
_STEP, _PARTIAL = int(FrameKind.STEP), int(FrameKind.PARTIAL)
_PLAN, _QUERY, _KEY_VALUE = int(Flag.PLAN), int(Flag.QUERY), int(Flag.KEY_VALUE)

_ROW_BYTES_MOST = 64
"""Bytes a plan may take per row of the step besides its token id."""

_PIECE_BYTES = 2**17
"""How much of a large frame leaves before it is summed up: what the other side needs to go on meanwhile."""

Packed = Iterable[list[memoryview]]
"""A frame's buffers in the order in which they leave, those of one list together."""

_Lengths = tuple[int, int, int, int]


def torch_dtype(geometry: KvGeometry) -> torch.dtype:
    """The cache's element type."""
    return _DTYPES[geometry.dtype]


class FrameCodec:
    """Frames of one lane. Stateless; `rows_most` bounds the rows of a message, and so every buffer."""

    def __init__(self, geometry: KvGeometry, incarnation: int, rows_most: int) -> None:
        self._incarnation = incarnation
        self._dtype = torch_dtype(geometry)
        self._query_shape = (geometry.query_heads, geometry.head_size)
        self._kv_shape = (geometry.kv_heads, geometry.head_size)
        self._lse_shape = (geometry.query_heads,)
        query = rows_most * geometry.query_heads * geometry.head_size * self._dtype.itemsize
        key = rows_most * geometry.kv_heads * geometry.head_size * self._dtype.itemsize
        out = rows_most * geometry.query_heads * geometry.head_size * 4
        self._lengths_most: dict[FrameKind, _Lengths] = {
            FrameKind.STEP: (4096 + rows_most * _ROW_BYTES_MOST, query, key, key),
            FrameKind.PARTIAL: (out, rows_most * geometry.query_heads * 4, 0, 0),
            FrameKind.FAULT: (frames.FAULT_BYTES_MOST, 0, 0, 0),
            FrameKind.CLOSE: (0, 0, 0, 0),
        }

    def pack_message(self, message: LayerMessage) -> Packed:
        """Buffers of a STEP frame, tensors uncopied where they are contiguous and on the CPU.

        Raises InvalidRequest when it is too large for the lane.
        """
        flags = plan_bytes = query_bytes = kv_bytes = 0
        sections: list[Section] = []
        if message.plan is not None:
            plan = pack_plan(message.plan)
            flags, plan_bytes = _PLAN, len(plan)
            sections.append(plan)
        if message.query is not None:
            query = self._raw(message.query)
            flags, query_bytes = flags | _QUERY, query.nbytes
            sections.append(query)
        if message.key is not None and message.value is not None:
            key, value = self._raw(message.key), self._raw(message.value)
            flags, kv_bytes = flags | _KEY_VALUE, key.nbytes
            sections += key, value
        place = (message.step, message.micro_batch, message.layer, message.deadline_ms, message.window or 0)
        return self._pack(
            FrameKind.STEP, flags, place, sections, (plan_bytes, query_bytes, kv_bytes, kv_bytes)
        )

    def pack_reply(self, reply: PartialReply, transfer_seconds: float = 0.0) -> Packed:
        """Buffers of a PARTIAL frame; `transfer_seconds`: what moving bytes took since the reply before."""
        place = (reply.step, reply.micro_batch, reply.layer, 0, 0)
        out, lse = _bytes_of(reply.out), _bytes_of(reply.lse)
        seconds = (reply.compute_seconds, transfer_seconds)
        return self._pack(FrameKind.PARTIAL, 0, place, (out, lse), (out.nbytes, lse.nbytes, 0, 0), seconds)

    def pack_fault(self, message: LayerMessage, error: AnabranchError) -> Packed:
        """Buffers of the FAULT that answers `message`."""
        place = (message.step, message.micro_batch, message.layer, 0, 0)
        fault = frames.pack_error(error)
        return self._pack(FrameKind.FAULT, 0, place, (fault,), (len(fault), 0, 0, 0))

    def pack_close(self) -> Packed:
        """Buffers of a CLOSE frame."""
        return self._pack(FrameKind.CLOSE, 0, (0, 0, 0, 0, 0), (), (0, 0, 0, 0))

    def read_header(self, data: ReceivedBytes) -> FrameHeader:
        """A header of this lane within its limits. Raises LaneBroken, Fenced or VersionMismatch."""
        header = frames.unpack_header(data)
        frames.check_incarnation(header, self._incarnation)
        most = self._lengths_most[header.kind]
        if not _fit(header.lengths, most):
            raise LaneBroken(f"a {header.kind.name} frame announces {header.lengths} bytes; at most {most}")
        if header.micro_batch >= MICRO_BATCHES_MOST:
            raise LaneBroken(f"a frame of micro-batch {header.micro_batch} of {MICRO_BATCHES_MOST}")
        return header

    def read_message(self, frame: Frame) -> LayerMessage:
        """A STEP frame's message; its tensors are views of the frame's memory. Raises LaneBroken."""
        header, flags = frame.header, frame.header.flags
        shape = (_STEP, flags, header.lengths)
        tensors = frame.memory.views(shape)
        if tensors is None:
            tensors = self._step_tensors(frame)
            frame.memory.keep_views(shape, tensors)
        query, key, value = tensors
        has_key = flags & _KEY_VALUE
        return LayerMessage(
            header.step,
            header.micro_batch,
            header.layer,
            header.deadline_ms,
            unpack_plan(frame.payload.data[: header.lengths[0]]) if flags & _PLAN else None,
            query if flags & _QUERY else None,
            key if has_key else None,
            value if has_key else None,
            header.window or None,
        )

    def read_reply(self, frame: Frame) -> PartialReply:
        """A PARTIAL frame's reply; its tensors are views of the frame's memory. Raises LaneBroken."""
        header = frame.header
        shape = (_PARTIAL, 0, header.lengths)
        tensors = frame.memory.views(shape)
        if tensors is None:
            tensors = self._reply_tensors(frame)
            frame.memory.keep_views(shape, tensors)
        out, lse = tensors
        return PartialReply(
            header.step,
            header.micro_batch,
            header.layer,
            out,
            lse,
            header.compute_seconds,
            header.transfer_seconds,
        )

    def read_fault(self, frame: Frame) -> AnabranchError:
        """The error of a FAULT frame. Raises LaneBroken when there is none in it."""
        return frames.unpack_error(frame.payload)

    def _step_tensors(self, frame: Frame) -> tuple[Tensor, ...]:
        if frame.header.lengths[0] % PLAN_ALIGNMENT:
            raise LaneBroken("a plan leaves the tensors behind it unaligned")
        _, query, key, value = _split(frame)
        if len(key) != len(value):
            raise LaneBroken(f"{len(key)} bytes of keys for {len(value)} of values")
        shaped = ((query, self._query_shape), (key, self._kv_shape), (value, self._kv_shape))
        return tuple(_rows(raw, self._dtype, shape) for raw, shape in shaped)

    def _reply_tensors(self, frame: Frame) -> tuple[Tensor, ...]:
        raw_out, raw_lse, _, _ = _split(frame)
        out = _rows(raw_out, torch.float32, self._query_shape)
        lse = _rows(raw_lse, torch.float32, self._lse_shape)
        if out.shape[0] != lse.shape[0]:
            raise LaneBroken(f"{out.shape[0]} rows of outputs for {lse.shape[0]} of lse")
        return out, lse

    def _raw(self, tensor: Tensor) -> npt.NDArray[Any]:
        if tensor.dtype is not self._dtype:
            raise InvalidRequest(f"a lane of {self._dtype} was given {tensor.dtype}")
        return _bytes_of(tensor)

    def _pack(
        self,
        kind: FrameKind,
        flags: int,
        place: tuple[int, int, int, int, int],
        sections: Sequence[Section],
        lengths: _Lengths,
        seconds: tuple[float, float] = (0.0, 0.0),
    ) -> Packed:
        """place: step, micro-batch, layer, deadline ms, window; seconds: compute, transfer.

        `sections` leaves out what is not there, `lengths` has a zero for it.
        """
        if not _fit(lengths, self._lengths_most[kind]):
            raise InvalidRequest(f"a {kind.name} frame of {lengths} bytes exceeds the lane's limits")
        try:
            header = frames.pack_header(kind, flags, self._incarnation, place, lengths, seconds)
        except struct.error as error:
            raise InvalidRequest(f"a frame has a number that does not fit its field: {error}") from error
        if sum(lengths) > _PIECE_BYTES:
            return _pieces(header, sections)
        trailer = frames.pack_trailer(frames.checksum(sections))
        return ([memoryview(header), *map(_memory, sections), memoryview(trailer)],)


def _pieces(header: bytes, sections: Sequence[Section]) -> Iterator[list[memoryview]]:
    """A large frame; each piece is summed up once it has left."""
    yield [memoryview(header)]
    value = 0
    for section in sections:
        raw = np.frombuffer(section, dtype=np.uint8)
        for start in range(0, len(raw), _PIECE_BYTES):
            piece = raw[start : start + _PIECE_BYTES]
            yield [piece.data]
            value = frames.extend_checksum(value, piece)
    yield [memoryview(frames.pack_trailer(value))]


def _memory(section: Section) -> memoryview:
    return memoryview(section) if isinstance(section, bytes) else section.data


def _bytes_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's memory; a copy of it where that is strided or on a device."""
    if not (tensor.is_cpu and tensor.is_contiguous()):
        tensor = tensor.contiguous().cpu()
    if tensor.dtype is torch.bfloat16:  # numpy does not know it
        tensor = tensor.view(torch.int16)
    raw: npt.NDArray[Any] = tensor.numpy()
    return raw


def _fit(lengths: _Lengths, most: _Lengths) -> bool:
    return lengths[0] <= most[0] and lengths[1] <= most[1] and lengths[2] <= most[2] and lengths[3] <= most[3]


def _split(frame: Frame) -> tuple[Tensor, ...]:
    payload = frame.memory.tensor[HEADER_BYTES : HEADER_BYTES + frame.header.payload_bytes]
    return torch.split(payload, list(frame.header.lengths))


def _rows(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """[rows, *shape] over raw bytes."""
    row_bytes = math.prod(shape) * dtype.itemsize
    if len(raw) % row_bytes:
        raise LaneBroken(f"{len(raw)} bytes are no whole number of rows of {row_bytes}")
    return raw.view(dtype).view(len(raw) // row_bytes, *shape)
