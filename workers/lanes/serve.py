"""The attention side of a lane over any byte stream: frames in, frames out, in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.errors import AnabranchError, LaneBroken
from workers.lanes.answer import answer
from workers.lanes.assembler import FrameAssembler, GrowingBuffer
from workers.lanes.codec import Frame, FrameCodec
from workers.lanes.frames import Bytes, FrameKind
from workers.lanes.link import ByteLink
from workers.lanes.messages import LaneHandler

_IDLE_S = 1.0
"""How often an idle lane looks whether it should end."""


@dataclass(frozen=True, slots=True)
class LaneEnd:
    """What a ticket stands for: the attention side of one lane, ready to be served."""

    incarnation: int
    codec: FrameCodec
    handler: LaneHandler


def serve_link(lane: LaneEnd, link: ByteLink, stop: threading.Event, stall_s: float) -> None:
    """Serve a lane until it closes or `stop` is set. Raises LaneBroken, Fenced or VersionMismatch.

    A frame once begun, and a reply, must get through within `stall_s` seconds.
    """
    assembler = FrameAssembler(lane.codec, GrowingBuffer())
    while not stop.is_set():
        idle = assembler.is_between_frames
        count = link.read_into(assembler.wanted(), time.monotonic() + (_IDLE_S if idle else stall_s))
        if count == 0:
            if not idle:
                raise LaneBroken(f"a frame stopped arriving for {stall_s} s")
            continue
        frame = assembler.fill(count)
        if frame is None:
            continue
        if frame.header.kind is FrameKind.CLOSE:
            return
        buffers = respond(lane, frame)
        if buffers is not None:
            link.write(buffers, time.monotonic() + stall_s, _let_wait)
    link.write(lane.codec.pack_close(), time.monotonic() + _IDLE_S, _let_wait)


def serve_parts(lane: LaneEnd, arriving: Iterable[bytes]) -> Iterator[bytes]:
    """The same over a stream of byte strings; yields each reply whole."""
    assembler = FrameAssembler(lane.codec, GrowingBuffer())
    for part in arriving:
        rest = memoryview(part)
        while rest:
            wanted = assembler.wanted()
            count = min(len(wanted), len(rest))
            wanted[:count] = rest[:count]
            rest = rest[count:]
            frame = assembler.fill(count)
            if frame is None:
                continue
            if frame.header.kind is FrameKind.CLOSE:
                return
            buffers = respond(lane, frame)
            if buffers is not None:
                yield b"".join(buffer.tobytes() for buffer in buffers)


def respond(lane: LaneEnd, frame: Frame) -> list[Bytes] | None:
    """The frame that answers a STEP, if it has an answer. Raises LaneBroken for any other kind."""
    if frame.header.kind is not FrameKind.STEP:
        raise LaneBroken(f"a {frame.header.kind.name} arrived at the attention side")
    message = lane.codec.read_message(frame)
    outcome = answer(lane.handler, message)
    if outcome is None:
        return None
    if isinstance(outcome, AnabranchError):
        return lane.codec.pack_fault(message, outcome)
    return lane.codec.pack_reply(outcome)


def _let_wait() -> None:
    """Requests may wait while a reply leaves: the dense side reads whenever it cannot write."""
