"""Messages to frames and back: which tensor stands in which section, and how long each may be."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.errors import AnabranchError, InvalidRequest, LaneBroken
from cluster.types import KvGeometry
from workers.lanes import frames
from workers.lanes.frames import Bytes, Flag, FrameHeader, FrameKind
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.plan_bytes import pack_plan, unpack_plan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOTHING = np.empty(0, dtype=np.uint8)
_NO_FLAGS = Flag(0)

_ROW_BYTES_MOST = 64
"""Bytes a plan may take per row of the step besides its token id."""


def torch_dtype(geometry: KvGeometry) -> torch.dtype:
    """The cache's element type."""
    return _DTYPES[geometry.dtype]


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that checked: its header and a view of its payload, uint8."""

    header: FrameHeader
    payload: Tensor


class FrameCodec:
    """Frames of one lane. Stateless; `rows_most` bounds the rows of a message, and so every buffer."""

    def __init__(self, geometry: KvGeometry, incarnation: int, rows_most: int) -> None:
        self._geometry = geometry
        self._incarnation = incarnation
        self._dtype = torch_dtype(geometry)
        query = rows_most * geometry.query_heads * geometry.head_size * self._dtype.itemsize
        key = rows_most * geometry.kv_heads * geometry.head_size * self._dtype.itemsize
        out = rows_most * geometry.query_heads * geometry.head_size * 4
        self._lengths_most: dict[FrameKind, tuple[int, int, int, int]] = {
            FrameKind.STEP: (4096 + rows_most * _ROW_BYTES_MOST, query, key, key),
            FrameKind.PARTIAL: (out, rows_most * geometry.query_heads * 4, 0, 0),
            FrameKind.FAULT: (frames.FAULT_BYTES_MOST, 0, 0, 0),
            FrameKind.CLOSE: (0, 0, 0, 0),
        }

    def pack_message(self, message: LayerMessage) -> list[Bytes]:
        """Buffers of a STEP frame, tensors uncopied where they are contiguous and on the CPU.

        Raises InvalidRequest when it is too large for the lane.
        """
        flags = _NO_FLAGS
        sections = [_NOTHING] * frames.SECTIONS
        if message.plan is not None:
            flags, sections[0] = flags | Flag.PLAN, pack_plan(message.plan)
        if message.query is not None:
            flags, sections[1] = flags | Flag.QUERY, self._raw(message.query)
        if message.key is not None and message.value is not None:
            flags |= Flag.KEY_VALUE
            sections[2:] = self._raw(message.key), self._raw(message.value)
        place = (message.step, message.micro_batch, message.layer)
        return self._pack(
            FrameKind.STEP,
            place,
            sections,
            flags,
            deadline_ms=message.deadline_ms,
            window=message.window or 0,
        )

    def pack_reply(self, reply: PartialReply) -> list[Bytes]:
        """Buffers of a PARTIAL frame."""
        sections = [_bytes_of(reply.out), _bytes_of(reply.lse), _NOTHING, _NOTHING]
        place = (reply.step, reply.micro_batch, reply.layer)
        return self._pack(FrameKind.PARTIAL, place, sections, seconds=reply.compute_seconds)

    def pack_fault(self, message: LayerMessage, error: AnabranchError) -> list[Bytes]:
        """Buffers of the FAULT that answers `message`."""
        sections = [frames.pack_error(error), _NOTHING, _NOTHING, _NOTHING]
        return self._pack(FrameKind.FAULT, (message.step, message.micro_batch, message.layer), sections)

    def pack_close(self) -> list[Bytes]:
        """Buffers of a CLOSE frame."""
        return self._pack(FrameKind.CLOSE, (0, 0, 0), [_NOTHING] * frames.SECTIONS)

    def read_header(self, data: Bytes) -> FrameHeader:
        """A header of this lane within its limits. Raises LaneBroken, Fenced or VersionMismatch."""
        header = frames.unpack_header(data)
        frames.check_incarnation(header, self._incarnation)
        most = self._lengths_most[header.kind]
        if any(length > limit for length, limit in zip(header.lengths, most, strict=True)):
            raise LaneBroken(f"a {header.kind.name} frame announces {header.lengths} bytes; at most {most}")
        return header

    def read_message(self, frame: Frame) -> LayerMessage:
        """A STEP frame's message; its tensors are views of the payload. Raises LaneBroken."""
        header = frame.header
        plan, query, key, value = _split(frame)
        shape = self._geometry
        has_key = Flag.KEY_VALUE in header.flags
        if has_key and len(key) != len(value):
            raise LaneBroken(f"{len(key)} bytes of keys for {len(value)} of values")
        return LayerMessage(
            step=header.step,
            micro_batch=header.micro_batch,
            layer=header.layer,
            deadline_ms=header.deadline_ms,
            plan=unpack_plan(plan.numpy()) if Flag.PLAN in header.flags else None,
            query=self._rows(query, self._dtype, shape.query_heads, shape.head_size)
            if Flag.QUERY in header.flags
            else None,
            key=self._rows(key, self._dtype, shape.kv_heads, shape.head_size) if has_key else None,
            value=self._rows(value, self._dtype, shape.kv_heads, shape.head_size) if has_key else None,
            window=header.window or None,
        )

    def read_reply(self, frame: Frame) -> PartialReply:
        """A PARTIAL frame's reply; its tensors are views of the payload. Raises LaneBroken."""
        header = frame.header
        out, lse, _, _ = _split(frame)
        out = self._rows(out, torch.float32, self._geometry.query_heads, self._geometry.head_size)
        lse = self._rows(lse, torch.float32, self._geometry.query_heads)
        if out.shape[0] != lse.shape[0]:
            raise LaneBroken(f"{out.shape[0]} rows of outputs for {lse.shape[0]} of lse")
        return PartialReply(header.step, header.micro_batch, header.layer, out, lse, header.seconds)

    def read_fault(self, frame: Frame) -> AnabranchError:
        """The error of a FAULT frame. Raises LaneBroken when there is none in it."""
        return frames.unpack_error(frame.payload.numpy())

    def _raw(self, tensor: Tensor) -> Bytes:
        if tensor.dtype != self._dtype:
            raise InvalidRequest(f"a lane of {self._dtype} was given {tensor.dtype}")
        return _bytes_of(tensor)

    def _rows(self, raw: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """[rows, *shape] over raw bytes."""
        row_bytes = int(np.prod(shape)) * dtype.itemsize
        if len(raw) % row_bytes:
            raise LaneBroken(f"{len(raw)} bytes are no whole number of rows of {row_bytes}")
        return raw.view(dtype).view(len(raw) // row_bytes, *shape)

    def _pack(
        self,
        kind: FrameKind,
        place: tuple[int, int, int],
        sections: Sequence[Bytes],
        flags: Flag = _NO_FLAGS,
        *,
        deadline_ms: int = 0,
        window: int = 0,
        seconds: float = 0.0,
    ) -> list[Bytes]:
        first, second, third, fourth = map(len, sections)
        lengths = (first, second, third, fourth)
        if any(length > limit for length, limit in zip(lengths, self._lengths_most[kind], strict=True)):
            raise InvalidRequest(f"a {kind.name} frame of {lengths} bytes exceeds the lane's limits")
        step, micro_batch, layer = place
        checksum = frames.checksum(sections)
        try:
            header = frames.pack_header(
                FrameHeader(
                    kind, flags, self._incarnation, step, micro_batch, layer, deadline_ms, window, lengths,
                    seconds, checksum,
                )
            )  # fmt: skip
        except struct.error as error:
            raise InvalidRequest(f"a frame has a number that does not fit its field: {error}") from error
        return [header, *(section for section in sections if len(section))]


def _bytes_of(tensor: Tensor) -> Bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    raw: Bytes = flat.view(torch.uint8).numpy()
    return raw


def _split(frame: Frame) -> tuple[Tensor, ...]:
    return torch.split(frame.payload, list(frame.header.lengths))
