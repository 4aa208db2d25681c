"""The attention side of a lane over any byte stream: frames in, frames out, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic

import torch

from cluster.errors import AnabranchError, LaneBroken
from workers.lanes.answer import answer
from workers.lanes.codec import FrameCodec, Packed
from workers.lanes.frame_reader import Frame, FrameReader
from workers.lanes.frames import FrameKind
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
    reader = FrameReader(lane.codec.read_header)
    moving = _Moving()
    while not stop.is_set():
        idle = reader.is_between_frames
        count = link.read_into(reader.wanted(), monotonic() + (_IDLE_S if idle else stall_s))
        if count == 0:
            if not idle:
                raise LaneBroken(f"a frame stopped arriving for {stall_s} s")
            continue
        moving.begin()
        reader.received(count)
        while (frame := reader.next()) is not None:
            if frame.header.kind is FrameKind.CLOSE:
                return
            packed = _respond(lane, frame, moving)
            deadline_s = monotonic() + stall_s
            for buffers in packed:
                link.write(buffers, deadline_s, None)  # the dense side reads when it cannot write
        moving.end()
    deadline_s = monotonic() + _IDLE_S
    for buffers in lane.codec.pack_close():
        link.write(buffers, deadline_s, None)


def serve_parts(lane: LaneEnd, arriving: Iterable[bytes]) -> Iterator[bytes]:
    """The same over a stream of byte strings; yields what leaves together."""
    reader = FrameReader(lane.codec.read_header)
    for part in arriving:
        moving = _Moving()
        moving.begin()
        rest = memoryview(part)
        while rest:
            wanted = reader.wanted()
            count = min(len(wanted), len(rest))
            wanted[:count] = rest[:count]
            rest = rest[count:]
            reader.received(count)
            while (frame := reader.next()) is not None:
                if frame.header.kind is FrameKind.CLOSE:
                    return
                for buffers in _respond(lane, frame, moving):
                    yield b"".join(buffers)


class _Moving:
    """Adds up the time this side spends on bytes, between the coming of some and the leaving of a reply."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since_s = 0.0

    def begin(self) -> None:
        """Bytes came, or a handler is done with them."""
        self._since_s = monotonic()

    def end(self) -> None:
        """All that came is dealt with, or a handler takes over."""
        self._seconds += monotonic() - self._since_s

    def take(self) -> float:
        """Seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _respond(lane: LaneEnd, frame: Frame, moving: _Moving) -> Packed:
    """The frame that answers a STEP, if it has an answer. Raises LaneBroken for any other kind."""
    if frame.header.kind is not FrameKind.STEP:
        raise LaneBroken(f"a {frame.header.kind.name} arrived at the attention side")
    message = lane.codec.read_message(frame)
    moving.end()
    with torch.inference_mode():
        outcome = answer(lane.handler, message)
    moving.begin()
    if outcome is None:
        return ()
    if isinstance(outcome, AnabranchError):
        return lane.codec.pack_fault(message, outcome)
    return lane.codec.pack_reply(outcome, moving.take())
