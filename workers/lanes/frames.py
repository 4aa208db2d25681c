"""The bytes of a lane: frames with a fixed header, little-endian, up to four sections, and their checksum.

    offset  field               offset  field
      0     magic  "ANBR"         32    window u32 (0: none)
      4     wire version u16      36    section lengths, 4 x u32
      6     kind u8               52    zeros u32
      7     flags u8              56    compute seconds f64 (PARTIAL)
      8     lane incarnation u64  64    transfer seconds f64 (PARTIAL)
     16     step u64              72    zeros u32
     24     micro-batch u16       76    CRC32C of bytes 0..76 u32
     26     layer u16             80    sections, then CRC32C of all sections u32
     28     deadline ms u32

    kind       sections
    STEP       plan | query | key | value      flags say which are there; dense to attention
    PARTIAL    out | lse                       float32; attention to dense
    FAULT      status, reason, message, then metadata keys and values: each u16 length + UTF-8
    CLOSE      none                            the sender is done

Tensors are raw bytes in the dtype and head counts of the geometry, so a length tells the number of rows.
A frame read into aligned memory has its tensors aligned too: the header's size is a multiple of 16.
The checksum comes last so that each side sums up a large frame while the other is busy with its bytes.
The header is checked, its lengths against their limits too, before memory for the payload is taken, and the
payload before a byte of it is used: whatever does not check raises LaneBroken, another lane's
incarnation Fenced.
On a byte stream the ticket of `OpenLane` (`TICKET_BYTES`) precedes the dense side's first frame.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from cluster import rpc
from cluster.errors import AnabranchError, Fenced, LaneBroken, VersionMismatch
from cluster.types import WIRE_VERSION

Section = bytes | npt.NDArray[Any]
"""Contiguous memory of any element type; no memoryview, because the checksum takes none."""

ReceivedBytes = npt.NDArray[np.uint8]

MAGIC = b"ANBR"
TICKET_BYTES = 32
SECTIONS = 4

_FIELDS = struct.Struct("<4sHBBQQHHII4I4xdd4x")
_CHECKSUM = struct.Struct("<I")
_HEADER = struct.Struct(_FIELDS.format + "I")
HEADER_BYTES = _HEADER.size
TRAILER_BYTES = _CHECKSUM.size

_TEXT_MOST = 4096
_TEXTS_MOST = 32
FAULT_BYTES_MOST = _TEXTS_MOST * (_TEXT_MOST + 2)


class FrameKind(enum.IntEnum):
    """What a frame carries."""

    STEP = 1
    PARTIAL = 2
    FAULT = 3
    CLOSE = 4


class Flag(enum.IntFlag):
    """Which sections of a STEP are there; an empty one may be."""

    PLAN = 1
    QUERY = 2
    KEY_VALUE = 4


_KINDS = {int(kind): kind for kind in FrameKind}
_FLAGS_MOST = int(Flag.PLAN | Flag.QUERY | Flag.KEY_VALUE)


class FrameHeader(NamedTuple):
    """The header's fields, without what only guards them. A tuple, because two are made per layer."""

    kind: FrameKind
    flags: int
    incarnation: int
    step: int
    micro_batch: int
    layer: int
    deadline_ms: int
    window: int
    lengths: tuple[int, int, int, int]
    compute_seconds: float
    transfer_seconds: float

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        first, second, third, fourth = self.lengths
        return first + second + third + fourth


HeaderReader = Callable[[ReceivedBytes], FrameHeader]
"""Reads and checks a header; raises LaneBroken, Fenced or VersionMismatch."""


def checksum(sections: Sequence[Section]) -> int:
    """CRC32C over the sections one after the other."""
    value = 0
    for section in sections:
        value = extend_checksum(value, section)
    return value


def pack_header(
    kind: int,
    flags: int,
    incarnation: int,
    place: tuple[int, int, int, int, int],
    lengths: tuple[int, int, int, int],
    seconds: tuple[float, float],
) -> bytes:
    """The header's bytes; place: step, micro-batch, layer, deadline ms, window; seconds: compute, transfer.

    Raises struct.error when a number does not fit its field.
    """
    fields = _FIELDS.pack(MAGIC, WIRE_VERSION, kind, flags, incarnation, *place, *lengths, *seconds)
    return fields + _CHECKSUM.pack(google_crc32c.value(fields))


def unpack_header(data: ReceivedBytes) -> FrameHeader:
    """Raises LaneBroken when the bytes are no header, VersionMismatch when they are another version's."""
    assert len(data) == HEADER_BYTES, f"{len(data)} bytes are no header"
    whole = data.tobytes()
    (
        magic, version, kind, flags, incarnation, step, micro_batch, layer, deadline_ms, window,
        first, second, third, fourth, compute_s, transfer_s, header_checksum,
    ) = _HEADER.unpack(whole)  # fmt: skip
    if magic != MAGIC:
        raise LaneBroken("a frame does not begin with the magic: not a lane, or one out of step")
    if header_checksum != google_crc32c.value(whole[: _FIELDS.size]):
        raise LaneBroken("a frame's header fails its checksum")
    if version != WIRE_VERSION:
        raise VersionMismatch(f"a frame has wire version {version}; this process speaks {WIRE_VERSION}")
    known = _KINDS.get(kind)
    if known is None or flags > _FLAGS_MOST:
        raise LaneBroken(f"a frame has kind {kind} and flags {flags}")
    lengths = (first, second, third, fourth)
    return FrameHeader(
        known,
        flags,
        incarnation,
        step,
        micro_batch,
        layer,
        deadline_ms,
        window,
        lengths,
        compute_s,
        transfer_s,
    )


def check_incarnation(header: FrameHeader, incarnation: int) -> None:
    """Raise Fenced for a frame of another lane."""
    if header.incarnation != incarnation:
        raise Fenced(f"a frame of lane {header.incarnation:016x} arrived on lane {incarnation:016x}")


def extend_checksum(value: int, more: Section) -> int:
    """CRC32C of what `value` is that of, and `more`."""
    return int(google_crc32c.extend(value, more))


def pack_trailer(value: int) -> bytes:
    """What follows sections of this checksum."""
    return _CHECKSUM.pack(value)


def check_payload(header: FrameHeader, value: int, trailer: bytes) -> None:
    """Raise LaneBroken unless the sections, whose checksum is `value`, are what was sent."""
    if value != _CHECKSUM.unpack(trailer)[0]:
        raise LaneBroken(f"a {header.kind.name} frame of {header.payload_bytes} bytes fails its checksum")


def pack_error(error: AnabranchError) -> bytes:
    """The section of a FAULT; long texts are cut."""
    texts = [error.status, error.reason, error.message]
    texts += [text for pair in error.metadata.items() for text in pair]
    encoded = [text.encode()[:_TEXT_MOST] for text in texts[: _TEXTS_MOST - 1]]
    return b"".join(struct.pack("<H", len(text)) + text for text in encoded)


def unpack_error(data: ReceivedBytes) -> AnabranchError:
    """The error a FAULT carries, metadata included. Raises LaneBroken when the bytes are none."""
    whole, texts, offset = data.tobytes(), list[str](), 0
    while offset < len(whole):
        if offset + 2 > len(whole):
            raise LaneBroken("a fault is cut short")
        (length,) = struct.unpack_from("<H", whole, offset)
        texts.append(whole[offset + 2 : offset + 2 + length].decode(errors="replace"))
        offset += 2 + length
    if offset != len(whole) or len(texts) < 3 or len(texts) % 2 == 0:
        raise LaneBroken("a fault is cut short")
    error = rpc.from_parts(*texts[:3])
    error.metadata.update(zip(texts[3::2], texts[4::2], strict=True))
    return error
