"""The rules of the wire at the pool's service: generations, leases, epochs, versions, draining."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from anabranch.v1 import attention_pb2, attention_pb2_grpc, types_pb2
from anabranch.wire import geometry_message
from cluster.errors import (
    Fenced,
    InvalidRequest,
    ResourceExhausted,
    Unavailable,
    VersionMismatch,
)
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch
from tests.attention_pool import Pool, call
from tests.attention_worker import (
    BLOCKS,
    EPOCH,
    GEOMETRY,
    DenseHost,
    DenseSide,
    SmallSequence,
    assert_attended,
    caller,
    config,
    host_of,
    serving,
    wait_until,
)
from workers.attention.worker import AttentionWorker
from workers.lanes.dial import dial

torch.set_num_threads(1)


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


@pytest.fixture
def pool(host: DenseHost) -> Pool:
    """The worker's pool service."""
    return Pool(host.channel)


@pytest.fixture
def dense(worker: AttentionWorker, host: DenseHost) -> Iterator[DenseSide]:
    """A dense side over a unix socket lane."""
    side = DenseSide(host.open_lane())
    yield side
    side.lane.close()


def test_adopt_of_an_unknown_sequence_fences_all_the_same(pool: Pool) -> None:
    """Where nothing is held, a take-over still shuts out the older generation."""
    sequence = SmallSequence(1)
    assert pool.adopt(sequence, 3, sequence.token_ids) == []
    with pytest.raises(Fenced):
        pool.reserve(sequence, 0, 4, generation=2)
    pool.reserve(sequence, 0, 4, generation=3)


def test_lease_expires_and_frees() -> None:
    """A sequence nobody renews is freed by the worker's own clock; one that is renewed stays."""
    with serving(config(lease_ms=400)) as worker, host_of(worker) as host:
        pool = Pool(host.channel)
        kept, forgotten = SmallSequence(1), SmallSequence(2)
        pool.reserve(kept, 0, 40)
        pool.reserve(forgotten, 0, 40)

        def only_kept_is_held() -> bool:
            pool.renew(kept)
            return [item.sequence.request_id for item in pool.audit().holdings] == [kept.key.request_id]

        wait_until(only_kept_is_held)
        assert pool.renew(kept, forgotten) == [forgotten.key.request_id]
        with pytest.raises(Fenced):
            pool.reserve(forgotten, 0, 4)


def test_lane_traffic_renews_the_lease() -> None:
    """Steps keep a sequence alive without any Renew."""
    with serving(config(lease_ms=300)) as worker, host_of(worker) as host:
        pool = Pool(host.channel)
        busy, idle = SmallSequence(1), SmallSequence(2)
        shard = pool.reserve(busy, 0, 40)
        pool.reserve(idle, 0, 40)
        dense = DenseSide(host.open_lane())

        def idle_is_gone() -> bool:
            dense.step([(busy, busy.row(shard, 0, 1))])
            return pool.locate(idle) == []

        wait_until(idle_is_gone)
        assert pool.locate(busy) == [0]


def test_released_generation_stays_fenced(
    worker: AttentionWorker, host: DenseHost, pool: Pool, dense: DenseSide
) -> None:
    """Nothing of a released generation is served; releasing again is harmless; the next one is free."""
    sequence = SmallSequence(1)
    shard = pool.reserve(sequence, 0, 40)
    assert pool.release(sequence) == GEOMETRY.blocks_for(40)
    assert pool.release(sequence) == 0
    with pytest.raises(Fenced):
        pool.reserve(sequence, 0, 4)
    with pytest.raises(Fenced):
        dense.step([(sequence, sequence.row(shard, 0, 1))])
    pool.reserve(sequence, 0, 4, generation=2)
    assert pool.audit().blocks.free == BLOCKS - 1


def test_epoch_mismatch_is_refused(worker: AttentionWorker, host: DenseHost) -> None:
    """Every call that means another life of the worker is Fenced; 0 means "not known"."""
    sequence = SmallSequence(1)
    pool = Pool(host.channel, Epoch(EPOCH + 1))
    for attempt in (
        lambda: pool.reserve(sequence, 0, 4),
        lambda: pool.release(sequence),
        lambda: pool.adopt(sequence, 1, ()),
        lambda: pool.renew(sequence),
        lambda: dial(host.channel, host.address, Epoch(EPOCH + 1), caller()),
    ):
        with pytest.raises(Fenced):
            attempt()
    Pool(host.channel, Epoch(0)).reserve(sequence, 0, 4)


OWN = attention_pb2.OpenLaneRequest(
    believed=types_pb2.Believed(epoch=EPOCH),
    wire_version=WIRE_VERSION,
    layout_version=LAYOUT_VERSION,
    geometry=geometry_message(GEOMETRY),
    transports=[attention_pb2.LANE_TRANSPORT_GRPC],
)
DIFFERING = {
    "wire_version": attention_pb2.OpenLaneRequest(wire_version=WIRE_VERSION + 1),
    "layout_version": attention_pb2.OpenLaneRequest(layout_version=LAYOUT_VERSION + 1),
    "geometry.layers": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(layers=9)),
    "geometry.query_heads": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(query_heads=8)),
    "geometry.kv_heads": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(kv_heads=1)),
    "geometry.head_size": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(head_size=8)),
    "geometry.data_type": attention_pb2.OpenLaneRequest(
        geometry=types_pb2.KvGeometry(data_type=types_pb2.DATA_TYPE_BFLOAT16)
    ),
    "geometry.block_tokens": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(block_tokens=8)),
    "geometry.digest": attention_pb2.OpenLaneRequest(geometry=types_pb2.KvGeometry(digest="another")),
}


@pytest.mark.parametrize("field", DIFFERING)
def test_open_lane_names_the_differing_field(host: DenseHost, field: str) -> None:
    """Two processes that would not mean the same bytes are told which field differs."""
    stub = attention_pb2_grpc.AttentionServiceStub(host.channel)
    request = attention_pb2.OpenLaneRequest()
    request.CopyFrom(OWN)
    request.MergeFrom(DIFFERING[field])
    with pytest.raises(VersionMismatch, match=field):
        call(stub.OpenLane, request)
    assert call(stub.OpenLane, OWN).incarnation


def test_a_draining_worker_admits_nobody_new(
    worker: AttentionWorker, host: DenseHost, pool: Pool, dense: DenseSide
) -> None:
    """New sequences and lanes are told to go elsewhere; those here go on to their end."""
    sequence, late = SmallSequence(1), SmallSequence(2)
    shard = pool.reserve(sequence, 0, 8)
    dense.step([(sequence, sequence.row(shard, 0, 8))])
    worker.drain()
    with pytest.raises(Unavailable):
        pool.reserve(late, 0, 4)
    with pytest.raises(Unavailable):
        host.open_lane()
    assert pool.reserve(sequence, 8, 16) == shard
    part = (sequence, sequence.row(shard, 8, 1))
    assert_attended(dense.step([part]), [part])
    assert not worker.core.store.empty.is_set()
    pool.release(sequence)
    assert worker.core.store.empty.wait(10)


def test_what_does_not_fit_is_refused_and_changes_nothing(pool: Pool) -> None:
    """A reservation beyond the arena says how much there is; the account stays as it was."""
    sequence = SmallSequence(1)
    pool.reserve(sequence, 0, 8)
    before = pool.audit().blocks
    with pytest.raises(ResourceExhausted, match="blocks"):
        pool.reserve(sequence, 8, 10_000)
    with pytest.raises(ResourceExhausted):
        pool.reserve(SmallSequence(2), 0, 10_000)
    for first, end in ((4, 4), (6, 12)):
        with pytest.raises(InvalidRequest):
            pool.reserve(sequence, first, end)
    assert pool.audit().blocks == before
