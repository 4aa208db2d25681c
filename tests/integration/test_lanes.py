"""Lanes over real connections: unix socket, TCP and gRPC to a real attention worker, and to lying peers."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.errors import InvalidRequest, LaneBroken, NeedFull, ResourceExhausted, Unavailable
from cluster.types import ShardId
from tests.attention_worker import (
    GEOMETRY,
    DenseHost,
    DenseSide,
    SmallSequence,
    assert_attended,
    config,
    host_of,
    query_message,
    serving,
    wait_until,
)
from tests.listening import stop_listening, unix_sockets
from workers.attention.worker import AttentionWorker
from workers.lanes.codec import FrameCodec
from workers.lanes.framed import FramedLane
from workers.lanes.frames import TICKET_BYTES
from workers.lanes.messages import Lane, PartialReply
from workers.lanes.sockets import SocketLink, connect_tcp, connect_unix

torch.set_num_threads(1)

TRANSPORTS = ("inproc", "local", "tcp", "grpc")
REMOTE = TRANSPORTS[1:]


@pytest.fixture
def worker() -> Iterator[AttentionWorker]:
    """A worker of its own for each test."""
    with serving() as started:
        yield started


@pytest.fixture
def host(worker: AttentionWorker) -> Iterator[DenseHost]:
    """A dense worker's side of the worker."""
    with host_of(worker) as opened:
        yield opened


def lane_over(worker: AttentionWorker, host: DenseHost, transport: str) -> Lane:
    """A lane to the worker."""
    return worker.core.peer().open_lane() if transport == "inproc" else host.open_lane(transport)


def reserve(worker: AttentionWorker, sequence: SmallSequence) -> ShardId:
    """Room for a whole sequence."""
    return worker.core.store.reserve(sequence.key, sequence.generation, 0, sequence.length).shard.shard


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_steps_over_every_transport(worker: AttentionWorker, host: DenseHost, transport: str) -> None:
    """Prefill in chunks, then decoding, of two sequences: every reply is exact on every transport."""
    dense = DenseSide(lane_over(worker, host, transport))
    one, two = SmallSequence(1), SmallSequence(2)
    first, second = reserve(worker, one), reserve(worker, two)
    start = 0
    for count in (7, 5, 1, 1, 1):
        parts = [(one, one.row(first, start, count)), (two, two.row(second, start, count))]
        replies = dense.step(parts)
        if start:
            assert_attended(replies, parts)
        else:
            assert all(bool(reply.lse.isneginf().all()) for reply in replies)
        start += count
    dense.lane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_micro_batches_interleave(worker: AttentionWorker, host: DenseHost, transport: str) -> None:
    """Two micro-batches in flight at once get their own replies, whichever is asked for first."""
    dense = DenseSide(lane_over(worker, host, transport))
    sequences = [SmallSequence(1), SmallSequence(2)]
    shards = [reserve(worker, sequence) for sequence in sequences]
    pairs = list(zip(sequences, shards, strict=True))
    for micro_batch, (sequence, shard) in enumerate(pairs):
        dense.step([(sequence, sequence.row(shard, 0, 9))], micro_batch)
    dense.step_number += 1
    parts = [[(sequence, sequence.row(shard, 9, 1))] for sequence, shard in pairs]
    replies: list[list[PartialReply]] = [[], []]
    for layer in range(GEOMETRY.layers + 1):
        for micro_batch in (0, 1):
            dense.lane.send(dense.message(parts[micro_batch], layer, micro_batch))
        if layer < GEOMETRY.layers:
            for micro_batch in (1, 0):
                replies[micro_batch].append(dense.receive(layer, micro_batch))
    for micro_batch in (0, 1):
        assert_attended(replies[micro_batch], parts[micro_batch])
    dense.lane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_need_full(worker: AttentionWorker, host: DenseHost, transport: str) -> None:
    """A difference against a base the worker lacks is answered NeedFull; the plan whole then serves."""
    sequence = SmallSequence(1)
    shard = reserve(worker, sequence)
    dense = DenseSide(lane_over(worker, host, transport))
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    dense.lane.close()
    dense.lane = lane_over(worker, host, transport)
    parts = [(sequence, sequence.row(shard, 9, 1))]
    with pytest.raises(NeedFull):
        dense.step(parts)
    dense.encoder.forget(0)
    assert_attended(dense.step(parts), parts)
    dense.lane.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_step_nobody_asked_for_anymore_leaves_no_trace(
    worker: AttentionWorker, host: DenseHost, transport: str
) -> None:
    """After a step given up in the middle, the next step's replies are its own."""
    sequence = SmallSequence(1)
    shard = reserve(worker, sequence)
    dense = DenseSide(lane_over(worker, host, transport))
    dense.step([(sequence, sequence.row(shard, 0, 9))])
    parts = [(sequence, sequence.row(shard, 9, 1))]
    dense.step_number += 1
    dense.lane.send(dense.message(parts, 0))  # its reply is never received
    assert_attended(dense.step(parts), parts)
    dense.lane.close()


@pytest.mark.parametrize("transport", REMOTE)
def test_a_stopped_worker_breaks_its_lanes_at_once(transport: str) -> None:
    """The dense side learns of the worker's end long before its deadline."""
    with serving() as worker, host_of(worker) as host:
        lane = host.open_lane(transport)
        stopper = threading.Thread(target=worker.stop)
        stopper.start()
        began_s = time.monotonic()
        with pytest.raises(LaneBroken):
            lane.receive(1, 0, 0, began_s + 60)
        assert time.monotonic() - began_s < 20
        stopper.join()
        with pytest.raises(LaneBroken, match="closed"):
            lane.send(query_message())


@pytest.mark.parametrize("transport", REMOTE)
def test_noise_ends_its_own_lane_only(worker: AttentionWorker, host: DenseHost, transport: str) -> None:
    """Bytes that are no frame close the lane they came on; another lane and the store go on."""
    sequence = SmallSequence(1)
    shard = reserve(worker, sequence)
    good = DenseSide(host.open_lane(transport))
    good.step([(sequence, sequence.row(shard, 0, 9))])
    bad = host.open_lane(transport)
    bad.link.write([memoryview(b"\7" * 200)], time.monotonic() + 10, lambda: None)
    with pytest.raises(LaneBroken):
        bad.receive(1, 0, 0, time.monotonic() + 20)
    parts = [(sequence, sequence.row(shard, 9, 1))]
    assert_attended(good.step(parts), parts)
    good.lane.close()


def test_a_foreign_incarnation_ends_the_lane(worker: AttentionWorker, host: DenseHost) -> None:
    """Frames of another lane's incarnation are not served."""
    lane = host.open_lane()
    stranger = FramedLane(lane.link, FrameCodec(GEOMETRY, 1, 64))
    stranger.send(query_message())
    with pytest.raises(LaneBroken):
        stranger.receive(1, 0, 0, time.monotonic() + 20)


def test_tcp_bytes_are_those_the_kernel_counts(worker: AttentionWorker, host: DenseHost) -> None:
    """The lane's own count of received bytes equals TCP_INFO's."""
    lane = host.open_lane("tcp")
    sequence = SmallSequence(1)
    shard = reserve(worker, sequence)
    DenseSide(lane).step([(sequence, sequence.row(shard, 0, 9))])
    assert isinstance(lane.link, SocketLink)
    with socket.socket(fileno=os.dup(lane.link.fileno())) as kernel:
        assert kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        information = kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    (received,) = struct.unpack_from("<Q", information, 128)  # tcpi_bytes_received
    assert received == lane.bytes_received
    lane.close()


def test_the_worker_counts_bytes_of_lanes_that_ended(worker: AttentionWorker, host: DenseHost) -> None:
    """What the dense side sent and received is what the worker carried, over all transports."""
    sequence = SmallSequence(1)
    shard = reserve(worker, sequence)
    sent = received = 0
    for generation, transport in enumerate(REMOTE):
        lane = host.open_lane(transport)
        DenseSide(lane).step([(sequence, sequence.row(shard, 0, 2 + generation))])
        lane.close()
        sent += lane.bytes_sent + (TICKET_BYTES if transport == "grpc" else 0)
        received += lane.bytes_received
    wait_until(lambda: worker.lanes.lanes_open == 0)
    carried_sent, carried_received = worker.lanes.bytes_carried()
    # The gRPC lane shows its ticket in metadata, and its goodbye may be overtaken by the call's end.
    assert received == carried_sent
    assert 0 <= sent - carried_received <= 2 * TICKET_BYTES + 128


def test_a_lane_falls_back_to_the_next_transport(host: DenseHost) -> None:
    """Where the agreed unix socket cannot be reached, the next transport is used."""
    for address in unix_sockets(os.getpid()):
        stop_listening(address)
    lane = host.open_lane("local", "tcp")
    assert isinstance(lane.link, SocketLink)
    lane.close()
    with pytest.raises(Unavailable, match="no lane"):
        host.open_lane("local")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_gets_no_lane(worker: AttentionWorker, host: DenseHost) -> None:
    """An abstract socket has no mode: a connection of another user is cut off before its ticket counts."""
    program = (
        "import os, socket, sys; os.setuid(65534); link = socket.socket(socket.AF_UNIX); link.settimeout(20);"
        "link.connect(chr(0) + sys.argv[1]); sys.exit(len(link.recv(1)))"
    )
    for address in unix_sockets(os.getpid()):
        command = [sys.executable, "-c", program, address.removeprefix("\0")]
        assert subprocess.run(command, timeout=60, check=False).returncode == 0
    host.open_lane("local").close()


def test_a_killed_worker_leaves_no_file(tmp_path: Path) -> None:
    """A process that dies with its lanes open has put nothing into the temporary folder."""
    program = (
        "from workers.lanes.server import LaneServer; import os, signal;"
        "LaneServer(1, 1.0).listen_unix(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_lanes_are_bounded() -> None:
    """Beyond attention.max_lanes a lane is refused by name; a closed one makes room."""
    with serving(config(max_lanes=1)) as worker, host_of(worker) as host:
        lane = host.open_lane()
        wait_until(lambda: worker.lanes.lanes_open == 1)
        with pytest.raises(ResourceExhausted, match="max_lanes"):
            host.open_lane()
        lane.close()
        wait_until(lambda: worker.lanes.lanes_open == 0)
        host.open_lane().close()


def test_a_transport_not_served_is_refused(worker: AttentionWorker) -> None:
    """A worker that serves only gRPC lanes says so to a caller that wants only others."""
    settings = config()
    only_grpc = settings.model_copy(
        update={"lanes": settings.lanes.model_copy(update={"transports": ("grpc",)})}
    )
    with serving(only_grpc) as other, host_of(other) as host:
        with pytest.raises(InvalidRequest, match=r"lanes\.transports"):
            host.open_lane("local", "tcp")
        host.open_lane("local", "grpc").close()


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_a_connection_without_a_ticket_is_closed(host: DenseHost, transport: str) -> None:
    """A stranger, and whoever shows a ticket a second time, is cut off."""
    if transport == "local":
        (name,) = (address.removeprefix("\0") for address in unix_sockets(os.getpid()))
        links = [connect_unix(name)]
    else:
        lane = host.open_lane("tcp")
        assert isinstance(lane.link, SocketLink)
        with socket.socket(fileno=os.dup(lane.link.fileno())) as connected:
            address, port = connected.getpeername()
        links = [connect_tcp(address, port)]
        lane.close()
    for link in links:
        link.write([memoryview(bytes(TICKET_BYTES))], time.monotonic() + 5, lambda: None)
        with pytest.raises(LaneBroken):
            link.read_into(memoryview(bytearray(8)), time.monotonic() + 20)
        link.close()
