"""Both ends of a lane over a socket pair: lies, silence, damage and bugs of the other side."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.clock import ManualClock
from cluster.errors import Fenced, LaneBroken, ResourceExhausted
from cluster.types import KvGeometry
from tests.attention_worker import (
    GEOMETRY,
    query_message,
)
from workers.lanes.codec import FrameCodec, Packed
from workers.lanes.framed import FramedLane
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.serve import LaneEnd, serve_link
from workers.lanes.sockets import SocketLink
from workers.lanes.tickets import TicketBook

torch.set_num_threads(1)


class _Echo:
    """Answers a query with itself."""

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """The query as output."""
        if message.query is None:
            return None
        lse = torch.zeros(message.query.shape[:2])
        return PartialReply(message.step, message.micro_batch, message.layer, message.query, lse, 0.0)


class _Failing:
    """Has a bug."""

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """Fail as no handler should."""
        raise ZeroDivisionError("a bug")


def _serve_and_close(end: LaneEnd, link: SocketLink) -> None:
    serve_link(end, link, threading.Event(), 20.0)
    link.close()


@pytest.fixture
def pair() -> Iterator[tuple[SocketLink, SocketLink]]:
    """Two ends of a connection with small kernel buffers."""
    left, right = socket.socketpair()
    for end in (left, right):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    links = SocketLink(left), SocketLink(right)
    yield links
    for link in links:
        link.close()


WIDE = KvGeometry(1, 16, 16, 64, "float32", 16, "wide")


def test_two_sides_that_write_at_once_do_not_lock_each_other(pair: tuple[SocketLink, SocketLink]) -> None:
    """A message and a reply, each far beyond the kernel's buffers, pass each other."""
    codec = FrameCodec(WIDE, 7, 1024)
    server = threading.Thread(target=_serve_and_close, args=(LaneEnd(7, codec, _Echo()), pair[1]))
    server.start()
    lane = FramedLane(pair[0], codec)
    query = torch.randn(512, 16, 64)
    deadline_s = time.monotonic() + 30
    for micro_batch in (0, 1):
        lane.send(LayerMessage(1, micro_batch, 0, 30_000, query=query + micro_batch))
    for micro_batch in (0, 1):
        reply = lane.receive(1, micro_batch, 0, deadline_s)
        assert torch.equal(reply.out, query + micro_batch)
    lane.close()
    server.join(20)
    assert not server.is_alive()


def test_a_handlers_bug_answers_the_message_and_not_the_lane(pair: tuple[SocketLink, SocketLink]) -> None:
    """An unexpected exception becomes an INTERNAL fault; the lane goes on."""
    codec = FrameCodec(GEOMETRY, 7, 64)
    server = threading.Thread(target=_serve_and_close, args=(LaneEnd(7, codec, _Failing()), pair[1]))
    server.start()
    lane = FramedLane(pair[0], codec)
    for step in (1, 2):
        lane.send(query_message(step))
        with pytest.raises(Exception, match="ZeroDivisionError"):
            lane.receive(step, 0, 0, time.monotonic() + 10)
    lane.close()
    server.join(10)


def test_silence_breaks_the_lane_at_its_deadline(pair: tuple[SocketLink, SocketLink]) -> None:
    """No reply within the deadline closes the lane; it does not come back."""
    lane = FramedLane(pair[0], FrameCodec(GEOMETRY, 7, 64))
    lane.send(query_message())
    with pytest.raises(LaneBroken, match="within its deadline"):
        lane.receive(1, 0, 0, time.monotonic() + 0.05)
    with pytest.raises(LaneBroken, match="closed"):
        lane.receive(1, 0, 0, time.monotonic() + 10)


def test_a_peer_that_takes_nothing_breaks_the_lane(pair: tuple[SocketLink, SocketLink]) -> None:
    """A message that cannot leave within its deadline raises instead of blocking."""
    lane = FramedLane(pair[0], FrameCodec(WIDE, 7, 1024))
    with pytest.raises(LaneBroken, match="takes no bytes"):
        lane.send(LayerMessage(1, 0, 0, 50, query=torch.zeros(1024, 16, 64)))


def _buffers(packed: Packed) -> list[memoryview]:
    return [buffer for buffers in packed for buffer in buffers]


def _damaged(packed: Packed, flip: int) -> list[memoryview]:
    whole = bytearray(b"".join(_buffers(packed)))
    whole[flip] ^= 0xFF
    return [memoryview(whole)]


@pytest.mark.parametrize("flip", [0, 20, 74, 78, 80, 150, -1])
def test_a_damaged_reply_is_never_read(pair: tuple[SocketLink, SocketLink], flip: int) -> None:
    """A reply with one wrong byte breaks the lane at once."""
    codec = FrameCodec(GEOMETRY, 7, 64)
    lane = FramedLane(pair[0], codec)
    lane.send(query_message())
    reply = PartialReply(1, 0, 0, torch.ones(1, 4, 16), torch.ones(1, 4), 0.0)
    pair[1].write(_damaged(codec.pack_reply(reply), flip), time.monotonic() + 5, lambda: None)
    with pytest.raises(LaneBroken):
        lane.receive(1, 0, 0, time.monotonic() + 10)


def test_a_reply_to_another_lane_is_fenced(pair: tuple[SocketLink, SocketLink]) -> None:
    """A whole and valid frame of a foreign incarnation is refused as such."""
    lane = FramedLane(pair[0], FrameCodec(GEOMETRY, 7, 64))
    foreign = FrameCodec(GEOMETRY, 8, 64)
    reply = PartialReply(1, 0, 0, torch.ones(1, 4, 16), torch.ones(1, 4), 0.0)
    pair[1].write(_buffers(foreign.pack_reply(reply)), time.monotonic() + 5, lambda: None)
    with pytest.raises(Fenced):
        lane.receive(1, 0, 0, time.monotonic() + 10)
    with pytest.raises(LaneBroken, match="closed"):
        lane.send(query_message())


def test_a_frame_that_stops_in_the_middle_ends_the_lane(pair: tuple[SocketLink, SocketLink]) -> None:
    """The attention side gives a half frame its time and no more."""
    codec = FrameCodec(GEOMETRY, 7, 64)
    pair[0].write(_buffers(codec.pack_message(query_message()))[:1], time.monotonic() + 5, lambda: None)
    with pytest.raises(LaneBroken, match="stopped arriving"):
        serve_link(LaneEnd(7, codec, _Echo()), pair[1], threading.Event(), stall_s=0.05)


def test_tickets_are_good_once_and_not_for_long() -> None:
    """A ticket is redeemed once, within its time, and only so many wait."""
    clock = ManualClock()
    book = TicketBook(2, clock)
    end = LaneEnd(1, FrameCodec(GEOMETRY, 1, 8), _Echo())
    first, second = book.issue(end), book.issue(end)
    with pytest.raises(ResourceExhausted):
        book.issue(end)
    assert book.redeem(first) is end
    with pytest.raises(LaneBroken):
        book.redeem(first)
    clock.advance(60)
    with pytest.raises(LaneBroken):
        book.redeem(second)
    assert book.redeem(book.issue(end)) is end
