"""The attention side of a lane over any byte stream: frames in, frames out, in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import torch

from cluster.errors import AnabranchError, LaneBroken
from workers.lanes.answer import answer
from workers.lanes.codec import FrameCodec, Packed
from workers.lanes.frame_reader import Frame, FrameReader
from workers.lanes.frames import FrameKind
from workers.lanes.messages import LaneHandler
from workers.lanes.sockets import SocketLink

_IDLE_S = 1.0
"""How often an idle lane looks whether it should end."""


class StraightServer(Protocol):
    """Answers messages straight off a lane's socket."""

    def serve(self, wait_s: float, stall_s: float) -> bytes:
        """Until something arrives that it leaves to others, whose bytes so far this returns; empty where
        nothing came for `wait_s`, or ever will. Raises LaneBroken, also for a reply that does not get through
        within `stall_s`.
        """
        ...


class LaneSession(LaneHandler, Protocol):
    """A handler that may have some of a socket's messages answered before it sees them."""

    def straight(self, link: SocketLink, incarnation: int) -> StraightServer | None:
        """What serves the lane of this incarnation first; None: all messages are handled."""
        ...


def _nothing_straight(_link: SocketLink, _incarnation: int) -> None:
    """For a handler that sees every message itself."""


@dataclass(frozen=True, slots=True)
class LaneEnd:
    """What a ticket stands for: the attention side of one lane, ready to be served.

    `straight`: see `LaneSession`.
    """

    incarnation: int
    codec: FrameCodec
    handler: LaneHandler
    straight: Callable[[SocketLink, int], StraightServer | None] = _nothing_straight


def serve_link(lane: LaneEnd, link: SocketLink, stop: threading.Event, stall_s: float) -> None:
    """Serve a lane until it closes or `stop` is set. Raises LaneBroken, Fenced or VersionMismatch.

    A frame once begun, and a reply, must get through within `stall_s` seconds.
    """
    reader = FrameReader(lane.codec.read_header)
    straight = lane.straight(link, lane.incarnation)
    moving = _Moving()
    while not stop.is_set():
        for frame in _arriving(reader, link, straight, stall_s, moving):
            if frame.header.kind is FrameKind.CLOSE:
                return
            packed = _respond(lane, frame, moving)
            deadline_s = monotonic() + stall_s
            for buffers in packed:
                link.write(buffers, deadline_s, None)  # the dense side reads when it cannot write
    deadline_s = monotonic() + _IDLE_S
    for buffers in lane.codec.pack_close():
        link.write(buffers, deadline_s, None)


def serve_parts(lane: LaneEnd, arriving: Iterable[bytes]) -> Iterator[bytes]:
    """The same over a stream of byte strings; yields what leaves together."""
    reader = FrameReader(lane.codec.read_header)
    for part in arriving:
        moving = _Moving()
        moving.begin()
        for frame in _frames(reader, part):
            if frame.header.kind is FrameKind.CLOSE:
                return
            for buffers in _respond(lane, frame, moving):
                yield b"".join(buffers)


def _arriving(
    reader: FrameReader, link: SocketLink, straight: StraightServer | None, stall_s: float, moving: _Moving
) -> Iterator[Frame]:
    """The frames that some bytes complete, once there are any; none where a lane was idle for a while."""
    idle = reader.is_between_frames
    begun = straight.serve(_IDLE_S, stall_s) if idle and straight is not None else b""
    if begun:
        moving.begin()
        yield from _frames(reader, begun)
    else:
        wait_s = stall_s if not idle else _IDLE_S if straight is None else 0.0
        count = link.read_into(reader.wanted(), monotonic() + wait_s)
        if count == 0:
            if not idle:
                raise LaneBroken(f"a frame stopped arriving for {stall_s} s")
            return
        moving.begin()
        yield from _completed(reader, count)
    moving.end()


def _frames(reader: FrameReader, part: bytes) -> Iterator[Frame]:
    """The frames that `part` completes."""
    rest = memoryview(part)
    while rest:
        wanted = reader.wanted()
        count = min(len(wanted), len(rest))
        wanted[:count] = rest[:count]
        rest = rest[count:]
        yield from _completed(reader, count)


def _completed(reader: FrameReader, count: int) -> Iterator[Frame]:
    """The frames that `count` more bytes complete."""
    reader.received(count)
    while (frame := reader.next()) is not None:
        yield frame


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
