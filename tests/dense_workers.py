"""Dense workers with their servers, over the attention workers of a `DenseCluster`, as gateways meet them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.v1 import inference_pb2
from cluster.types import Epoch, WorkerId
from tests.cluster_harness import WAIT_S, DenseCluster, decoder_of
from workers.dense.worker import DenseWorker


def attention_members(cluster: DenseCluster) -> list[inference_pb2.Member]:
    """The attention workers as membership names them."""
    return [
        inference_pb2.Member(
            worker_id=member.worker,
            role=inference_pb2.ROLE_ATTENTION,
            epoch=member.epoch,
            address=member.address,
            state=inference_pb2.MEMBER_STATE_READY,
            load=inference_pb2.Load(
                blocks=inference_pb2.BlockAccount(capacity=member.blocks_capacity, free=member.blocks_free)
            ),
        )
        for member in cluster.members()
    ]


@contextmanager
def dense_worker(
    cluster: DenseCluster, folder: Path, worker: WorkerId, epoch: Epoch
) -> Iterator[DenseWorker]:
    """A serving one, connected to every attention worker; stopped at the end."""
    served = DenseWorker(cluster.config, decoder_of(folder), worker, epoch)
    served.start()
    served.set_members(attention_members(cluster))
    try:
        assert served.wait_connected(WAIT_S)
        yield served
    finally:
        served.stop()


def dense_member(worker: DenseWorker, name: WorkerId, epoch: Epoch) -> inference_pb2.Member:
    """One as membership names it."""
    return inference_pb2.Member(
        worker_id=name,
        role=inference_pb2.ROLE_DENSE,
        epoch=epoch,
        address=f"127.0.0.1:{worker.port}",
        state=inference_pb2.MEMBER_STATE_READY,
    )
