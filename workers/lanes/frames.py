"""The bytes of a lane: frames with a fixed header, little-endian, then up to four sections.

    offset  field               offset  field
      0     magic  "ANBR"         32    window u32 (0: none)
      4     wire version u16      36    section lengths, 4 x u32
      6     kind u8               52    compute seconds f64 (PARTIAL)
      7     flags u8              60    CRC32C of all sections u32
      8     lane incarnation u64  64    CRC32C of bytes 0..64 u32
     16     step u64              68    sections
     24     micro-batch u16
     26     layer u16
     28     deadline ms u32

    kind       sections
    STEP       plan | query | key | value      flags say which are there; dense to attention
    PARTIAL    out | lse                       float32; attention to dense
    FAULT      status, reason, message, then metadata keys and values: each u16 length + UTF-8
    CLOSE      none                            the sender is done

Tensors are raw bytes in the dtype and head counts of the geometry, so a length tells the number of rows.
The header is checked, its lengths against their limits too, before a byte of payload is read, and the
payload before a byte of it is used: whatever does not check raises LaneBroken, another lane's
incarnation Fenced.
On a byte stream the ticket of `OpenLane` (`TICKET_BYTES`) precedes the dense side's first frame.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from cluster import rpc
from cluster.errors import AnabranchError, Fenced, LaneBroken, VersionMismatch
from cluster.types import WIRE_VERSION

Bytes = npt.NDArray[np.uint8]

MAGIC = b"ANBR"
TICKET_BYTES = 32
SECTIONS = 4

_FIELDS = struct.Struct("<4sHBBQQHHII4IdI")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CHECKSUM.size

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


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The header's fields, without what only guards them."""

    kind: FrameKind
    flags: Flag
    incarnation: int
    step: int
    micro_batch: int
    layer: int
    deadline_ms: int
    window: int
    lengths: tuple[int, int, int, int]
    seconds: float
    payload_checksum: int

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return sum(self.lengths)


def checksum(sections: Sequence[Bytes]) -> int:
    """CRC32C over the sections one after the other."""
    value = 0
    for section in sections:
        value = google_crc32c.extend(value, section)
    return int(value)


def pack_header(header: FrameHeader) -> Bytes:
    """The header's bytes. Raises struct.error when a number does not fit its field."""
    fields = _FIELDS.pack(
        MAGIC,
        WIRE_VERSION,
        header.kind,
        header.flags,
        header.incarnation,
        header.step,
        header.micro_batch,
        header.layer,
        header.deadline_ms,
        header.window,
        *header.lengths,
        header.seconds,
        header.payload_checksum,
    )
    whole = fields + _CHECKSUM.pack(google_crc32c.value(fields))
    return np.frombuffer(whole, dtype=np.uint8)


def unpack_header(data: Bytes) -> FrameHeader:
    """Raises LaneBroken when the bytes are no header, VersionMismatch when they are another version's."""
    assert len(data) == HEADER_BYTES, f"{len(data)} bytes are no header"
    whole = data.tobytes()
    fields = _FIELDS.unpack_from(whole)
    if fields[0] != MAGIC:
        raise LaneBroken("a frame does not begin with the magic: not a lane, or one out of step")
    if _CHECKSUM.unpack_from(whole, _FIELDS.size)[0] != google_crc32c.value(whole[: _FIELDS.size]):
        raise LaneBroken("a frame's header fails its checksum")
    if fields[1] != WIRE_VERSION:
        raise VersionMismatch(f"a frame has wire version {fields[1]}; this process speaks {WIRE_VERSION}")
    if fields[2] not in FrameKind.__members__.values() or fields[3] & ~int(Flag(7)):
        raise LaneBroken(f"a frame has kind {fields[2]} and flags {fields[3]}")
    incarnation, step, micro_batch, layer, deadline_ms, window, *lengths = fields[4:14]
    return FrameHeader(
        kind=FrameKind(fields[2]),
        flags=Flag(fields[3]),
        incarnation=incarnation,
        step=step,
        micro_batch=micro_batch,
        layer=layer,
        deadline_ms=deadline_ms,
        window=window,
        lengths=(lengths[0], lengths[1], lengths[2], lengths[3]),
        seconds=fields[14],
        payload_checksum=fields[15],
    )


def check_incarnation(header: FrameHeader, incarnation: int) -> None:
    """Raise Fenced for a frame of another lane."""
    if header.incarnation != incarnation:
        raise Fenced(f"a frame of lane {header.incarnation:016x} arrived on lane {incarnation:016x}")


def check_payload(header: FrameHeader, payload: Bytes) -> None:
    """Raise LaneBroken unless the payload is what was sent."""
    assert len(payload) == header.payload_bytes, f"{len(payload)} of {header.payload_bytes} bytes"
    if checksum([payload]) != header.payload_checksum:
        raise LaneBroken(f"a {header.kind.name} frame of {len(payload)} bytes fails its checksum")


def pack_error(error: AnabranchError) -> Bytes:
    """The section of a FAULT; long texts are cut."""
    texts = [error.status, error.reason, error.message]
    texts += [text for pair in error.metadata.items() for text in pair]
    encoded = [text.encode()[:_TEXT_MOST] for text in texts[: _TEXTS_MOST - 1]]
    return np.frombuffer(b"".join(struct.pack("<H", len(text)) + text for text in encoded), dtype=np.uint8)


def unpack_error(data: Bytes) -> AnabranchError:
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
