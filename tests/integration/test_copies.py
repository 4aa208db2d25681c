"""Copies between attention workers take threads that others wait for: there are only so many at once."""

from __future__ import annotations

import contextlib
import socket

import grpc
import pytest

from anabranch import wire
from anabranch.v1 import kv_pb2, kv_pb2_grpc
from tests.attention_worker import EPOCH, SmallSequence, host_of, serving
from workers.attention.kv_service import COPIES_MOST


def _request(number: int, source: socket.socket) -> kv_pb2.PullRequest:
    request = kv_pb2.PullRequest(
        sequence=wire.sequence_message(SmallSequence(number).key),
        generation=1,
        first_position=0,
        token_ids=range(4),
        source_address="127.0.0.1:{1}".format(*source.getsockname()),
        source_generation=1,
        begins=True,
    )
    request.believed.epoch = EPOCH
    return request


def test_copies_from_silent_sources_keep_nobody_waiting() -> None:
    """While as many copies as may be wait for sources that say nothing, one more is refused at once, as to or
    from a worker that is busy, not full, and a reservation is answered; when the sources are gone there is
    room for copies again.
    """
    with contextlib.ExitStack() as ends:
        worker = ends.enter_context(serving())
        host = ends.enter_context(host_of(worker))
        pool = kv_pb2_grpc.KvServiceStub(host.channel)
        sources = [ends.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(COPIES_MOST)]
        requests = [_request(number, source) for number, source in enumerate(sources)]
        pulls = [pool.Pull.future(request, timeout=60) for request in requests]
        silent = [source.accept()[0] for source in sources]
        fetch = kv_pb2.FetchRequest(generation=1, end_position=4)
        fetch.believed.epoch = EPOCH
        for refused in (
            lambda: pool.Pull(_request(COPIES_MOST, sources[0]), timeout=20),
            lambda: list(pool.Fetch(fetch, timeout=20)),
        ):
            with pytest.raises(grpc.RpcError, match=r"UNAVAILABLE\s+details = .* copies under way"):
                refused()
        sequence = SmallSequence(COPIES_MOST + 1)
        reserved = kv_pb2.ReserveRequest(
            sequence=wire.sequence_message(sequence.key), generation=1, end_position=4
        )
        reserved.believed.epoch = EPOCH
        assert pool.Reserve(reserved, timeout=20).shard.end_position == 4
        for source, connected in zip(sources, silent, strict=True):
            source.close()
            connected.close()
        for pull in pulls:
            with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
                pull.result(timeout=20)
        with pytest.raises(grpc.RpcError, match="UNAVAILABLE"):
            pool.Pull(requests[0], timeout=20)
