"""A dense worker's side of an attention worker in another process, when the connection is given up."""

import pytest

from cluster.config import TlsConfig
from cluster.errors import Unavailable
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, WorkerId
from workers.dense.members import AttentionMember
from workers.dense.remote_peer import RemotePeer
from workers.lanes.dial import Caller
from workers.peer import ShardPrefix

GEOMETRY = KvGeometry(
    layers=1, query_heads=1, kv_heads=1, head_size=8, dtype="float32", block_tokens=4, digest="tiny"
)


def test_a_call_on_a_connection_that_was_given_up_finds_nobody() -> None:
    """Membership takes a worker away while a thread is about to ask it: the answer is that nobody is there,
    an error of the tree, on which room is sought elsewhere.
    """
    member = AttentionMember(WorkerId("attention-0"), Epoch(1), "127.0.0.1:1", 4, 4)
    peer = RemotePeer(member, Caller(WorkerId("dense-0"), Epoch(1), GEOMETRY, ("grpc",), 8), TlsConfig())
    peer.close()
    with pytest.raises(Unavailable):
        peer.reserve(SequenceKey("request"), Generation(1), 0, 4, ShardPrefix())
