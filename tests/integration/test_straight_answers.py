"""What a lane's socket answers without its session: plain messages, and nothing that needs a look."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from cluster.config import TierConfig
from cluster.errors import Fenced, LaneBroken
from cluster.types import ShardId
from tests.attention_worker import (
    EPOCH,
    GEOMETRY,
    WORKER,
    DenseSide,
    SmallSequence,
    assert_attended,
    config,
)
from workers.attention.core import AttentionCore
from workers.attention.session import AttendSession
from workers.attention.straight import StraightAnswers
from workers.kernels.select import has_compiled_code
from workers.lanes.codec import FrameCodec
from workers.lanes.framed import FramedLane
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.serve import LaneEnd, serve_link
from workers.lanes.sockets import SocketLink

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not has_compiled_code(), reason="the compiled kernel is not built")

INCARNATION = 7


class InPieces(SocketLink):
    """A dense side whose bytes arrive a few at a time."""

    piece_bytes = 7

    def write(
        self, buffers: Sequence[memoryview], deadline_s: float, on_readable: Callable[[], None] | None
    ) -> None:
        """The same bytes in many writes."""
        whole = b"".join(buffers)
        for start in range(0, len(whole), self.piece_bytes):
            super().write([memoryview(whole[start : start + self.piece_bytes])], deadline_s, on_readable)


class Damaging(SocketLink):
    """A dense side of which one message loses a bit on its way."""

    damaged = False

    def write(
        self, buffers: Sequence[memoryview], deadline_s: float, on_readable: Callable[[], None] | None
    ) -> None:
        """The bytes, the 100th of which is another where `damaged`."""
        whole = bytearray(b"".join(buffers))
        whole[100] ^= self.damaged
        super().write([memoryview(whole)], deadline_s, on_readable)


@dataclass
class Watched:
    """A lane to a session of `core`, and (step, layer) of each message that the session saw."""

    core: AttentionCore
    dense: DenseSide
    link: SocketLink
    session: AttendSession
    handled: list[tuple[int, int]] = field(default_factory=list)
    fault: BaseException | None = None

    @property
    def layers(self) -> list[int]:
        """Those of the present step that the session saw."""
        return [layer for step, layer in self.handled if step == self.dense.step_number]

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """The session's answer."""
        self.handled.append((message.step, message.layer))
        return self.session.handle(message)

    def straight(self, link: SocketLink, incarnation: int) -> StraightAnswers | None:
        """The session's."""
        return self.session.straight(link, incarnation)

    def serve(self, link: SocketLink) -> None:
        """Until the lane ends."""
        codec = FrameCodec(GEOMETRY, INCARNATION, 64)
        try:
            serve_link(
                LaneEnd(INCARNATION, codec, self, self.straight), link, threading.Event(), stall_s=10.0
            )
        except (LaneBroken, Fenced) as error:
            self.fault = error
        finally:
            link.close()


@contextlib.contextmanager
def watched(kind: type[SocketLink] = SocketLink, slice_rows: int = 64) -> Iterator[Watched]:
    """A core with one lane, whose dense side writes as `kind` does."""
    left, right = socket.socketpair()
    settings = config().attention.model_copy(update={"slice_rows": slice_rows})
    with AttentionCore(settings, TierConfig(arena=2**20), GEOMETRY, WORKER, EPOCH) as core:
        link = kind(left)
        lane = FramedLane(link, FrameCodec(GEOMETRY, INCARNATION, 64))
        lane_of = Watched(core, DenseSide(lane), link, core.session())
        server = threading.Thread(target=lane_of.serve, args=(SocketLink(right),))
        server.start()
        try:
            yield lane_of
        finally:
            lane.close()
            server.join(20.0)
            assert core.store.audit().total == core.store.audit().capacity


def reserve(core: AttentionCore, sequence: SmallSequence) -> ShardId:
    """Room for a whole sequence."""
    return core.store.reserve(sequence.key, sequence.generation, 0, sequence.length).shard.shard


@pytest.mark.parametrize("kind", [SocketLink, InPieces])
def test_the_session_sees_a_step_once(kind: type[SocketLink]) -> None:
    """Only the message with the plan is handled; every layer's answer is exact, however bytes arrive."""
    with watched(kind) as lane:
        sequence = SmallSequence(1)
        shard = reserve(lane.core, sequence)
        lane.dense.step([(sequence, sequence.row(shard, 0, 9))])
        parts = [(sequence, sequence.row(shard, 9, 2))]
        assert_attended(lane.dense.step(parts), parts)
    if kind is SocketLink:
        assert lane.layers == [0]


def test_two_micro_batches_take_turns() -> None:
    """Messages of two steps that stand, sent before either is answered, get their own replies."""
    with watched() as lane:
        sequences = [SmallSequence(1), SmallSequence(2)]
        shards = [reserve(lane.core, sequence) for sequence in sequences]
        pairs = list(zip(sequences, shards, strict=True))
        for micro_batch, (sequence, shard) in enumerate(pairs):
            lane.dense.step([(sequence, sequence.row(shard, 0, 9))], micro_batch)
        lane.dense.step_number += 1
        parts = [[(sequence, sequence.row(shard, 9, 1))] for sequence, shard in pairs]
        replies: list[list[PartialReply]] = [[], []]
        for layer in range(GEOMETRY.layers + 1):
            for micro_batch in (0, 1):
                lane.dense.lane.send(lane.dense.message(parts[micro_batch], layer, micro_batch))
            if layer < GEOMETRY.layers:
                for micro_batch in (1, 0):
                    replies[micro_batch].append(lane.dense.receive(layer, micro_batch))
        for micro_batch in (0, 1):
            assert_attended(replies[micro_batch], parts[micro_batch])
    assert lane.layers == [0, 0]


def test_what_changes_hands_is_looked_at() -> None:
    """A sequence that is released within a step makes the session see the rest of it, and costs the others
    nothing.
    """
    with watched() as lane:
        kept, given_up = SmallSequence(1), SmallSequence(2)
        shards = [reserve(lane.core, sequence) for sequence in (kept, given_up)]
        first = [(kept, kept.row(shards[0], 0, 9)), (given_up, given_up.row(shards[1], 0, 9))]
        lane.dense.step(first)
        parts = [(kept, kept.row(shards[0], 9, 1))]
        lane.dense.step_number += 1
        replies = []
        for layer in range(GEOMETRY.layers):
            if layer == 1:
                lane.core.store.release(given_up.key, given_up.generation, 0)
            lane.dense.lane.send(lane.dense.message(parts, layer))
            replies.append(lane.dense.receive(layer))
        assert_attended(replies, parts)
        assert lane.layers == [0, 1]


def test_a_step_whose_shard_is_gone_is_refused() -> None:
    """Rows of a shard released within their step get Fenced, not what lies in its blocks."""
    with watched() as lane:
        sequence = SmallSequence(1)
        shard = reserve(lane.core, sequence)
        lane.dense.step([(sequence, sequence.row(shard, 0, 9))])
        parts = [(sequence, sequence.row(shard, 9, 1))]
        lane.dense.step_number += 1
        lane.dense.lane.send(lane.dense.message(parts, 0))
        lane.dense.receive(0)
        lane.core.store.release(sequence.key, sequence.generation, 0)
        lane.dense.lane.send(lane.dense.message(parts, 1))
        with pytest.raises(Fenced):
            lane.dense.receive(1)


def test_keys_out_of_order_are_not_written() -> None:
    """A layer that is left out is noticed: the step after it is fenced, as the session would have it."""
    with watched() as lane:
        sequence = SmallSequence(1)
        shard = reserve(lane.core, sequence)
        lane.dense.step([(sequence, sequence.row(shard, 0, 9))])
        parts = [(sequence, sequence.row(shard, 9, 1))]
        with pytest.raises(Fenced):
            lane.dense.step(parts, layers=[0, 2])


def test_a_damaged_message_ends_the_lane_and_is_not_written() -> None:
    """A bit that flips in a plain message breaks the lane before anything of it is appended."""
    with watched(Damaging) as lane:
        sequence = SmallSequence(1)
        shard = reserve(lane.core, sequence)
        lane.dense.step([(sequence, sequence.row(shard, 0, 9))])
        parts = [(sequence, sequence.row(shard, 9, 1))]
        lane.dense.step_number += 1
        lane.dense.lane.send(lane.dense.message(parts, 0))
        lane.dense.receive(0)
        assert isinstance(lane.link, Damaging)
        lane.link.damaged = True
        lane.dense.lane.send(lane.dense.message(parts, 1))
        with pytest.raises(LaneBroken):
            lane.dense.lane.receive(lane.dense.step_number, 0, 1, time.monotonic() + 20)
    assert isinstance(lane.fault, LaneBroken)
    assert "checksum" in lane.fault.message


def test_a_step_of_several_slices_is_handled() -> None:
    """Rows that take several turns of the store are the session's, layer by layer."""
    with watched(slice_rows=2) as lane:
        sequence = SmallSequence(1)
        shard = reserve(lane.core, sequence)
        lane.dense.step([(sequence, sequence.row(shard, 0, 9))])
        parts = [(sequence, sequence.row(shard, 9, 5))]
        assert_attended(lane.dense.step(parts), parts)
    assert lane.layers == list(range(GEOMETRY.layers + 1))


def test_answers_are_those_of_the_session() -> None:
    """Bit for bit what a lane without a socket gives, and seconds are counted."""
    replies = []
    with watched() as lane:
        in_process = DenseSide(lane.core.peer().open_lane())
        for name, dense in (("one", lane.dense), ("other", in_process)):
            sequence = SmallSequence(1, name=name)
            shard = reserve(lane.core, sequence)
            dense.step([(sequence, sequence.row(shard, 0, 9))])
            replies.append(dense.step([(sequence, sequence.row(shard, 9, 3))]))
        assert lane.core.busy_seconds > 0
        for straight, handled in zip(*replies, strict=True):
            assert torch.equal(straight.out, handled.out)
            assert torch.equal(straight.lse, handled.lse)
            assert straight.compute_seconds > 0
