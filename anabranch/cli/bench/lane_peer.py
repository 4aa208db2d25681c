"""The other process of `anabranch bench lane`: an attention worker's lanes without attention, and bare loops.

    python -m anabranch.cli.bench.lane_peer HOST CORE SPIN_US [CERTIFICATE KEY]

prints one line of JSON, the addresses it serves, and ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import torch

from anabranch.cli.bench import bare
from anabranch.v1 import attention_pb2, attention_pb2_grpc
from cluster import rpc
from cluster.clock import monotonic
from cluster.config import TlsConfig
from cluster.types import Epoch, KvGeometry, WorkerId
from workers.attention.lane_service import LaneOffers, LaneService
from workers.attention.store import Store
from workers.lanes.messages import LayerMessage, PartialReply
from workers.lanes.serve import LaneSession
from workers.lanes.server import LaneServer
from workers.lanes.sockets import SocketLink

GEOMETRY = KvGeometry(
    layers=1, query_heads=16, kv_heads=16, head_size=64, dtype="float32", block_tokens=16, digest="bench"
)
"""A row of a query takes 4 KiB, and so does one of a reply."""

ROW_BYTES = 4096
ROWS_MOST = 4096
EPOCH = Epoch(1)

_STALL_S = 10.0


class Echo:
    """Answers a query of n rows with n rows it has at hand: a lane's cost without attention's."""

    def __init__(self) -> None:
        self._replies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def handle(self, message: LayerMessage) -> PartialReply | None:
        """Rows of zeros, as many as the query has."""
        assert message.query is not None
        rows = len(message.query)
        if rows not in self._replies:
            shape = (rows, GEOMETRY.query_heads, GEOMETRY.head_size)
            self._replies[rows] = torch.zeros(shape), torch.zeros(shape[:2])
        out, lse = self._replies[rows]
        return PartialReply(message.step, message.micro_batch, message.layer, out, lse, 0.0)

    def straight(self, link: SocketLink, incarnation: int) -> None:
        """Nothing: both Python sides are measured."""


def serve(host: str, spin_s: float, tls: TlsConfig) -> Iterator[dict[str, str | int]]:
    """Serve lanes, with TLS too where there is a certificate, and bare loops until resumed; yields their
    addresses once.
    """
    lanes = LaneServer(lanes_most=8, stall_s=_STALL_S, spin_s=spin_s)
    server = grpc.server(futures.ThreadPoolExecutor(8))
    with tempfile.TemporaryDirectory(prefix="anabranch-bench-") as folder:
        bare_path = str(Path(folder) / "bare")
        bare_unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bare_unix.bind(bare_path)
        bare_unix.listen()
        bare_tcp = bare.listen(host, 0)
        for listener in (bare_unix, bare_tcp):
            threading.Thread(target=bare.bounce_all, args=(listener,), daemon=True).start()
        offers = LaneOffers(
            {
                attention_pb2.LANE_TRANSPORT_LOCAL: lanes.listen_unix(),
                attention_pb2.LANE_TRANSPORT_TCP: f"{host}:{lanes.listen_tcp(host)}",
                attention_pb2.LANE_TRANSPORT_GRPC: "",
            },
            ROWS_MOST,
        )
        store = Store(WorkerId("bench"), EPOCH, GEOMETRY, 1, 60_000, monotonic)
        service = LaneService(store, _echo, lanes, offers)
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(service, server)
        port = server.add_insecure_port(f"{host}:0")
        found = {"address": f"{host}:{port}", "bare_unix": bare_path, "bare_tcp": bare_tcp.getsockname()[1]}
        credentials = rpc.server_credentials(tls)
        if credentials is not None:
            found["address_tls"] = f"{host}:{server.add_secure_port(f'{host}:0', credentials)}"
        server.start()
        yield found
        lanes.close()
        server.stop(None).wait()


def _echo() -> LaneSession:
    return Echo()


def main(host: str, core: int, spin_us: int, *certificate_and_key: str) -> None:
    """Serve on one core until the parent closes our standard input."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    certificate, key = certificate_and_key or (None, None)
    serving = serve(host, spin_us / 1e6, TlsConfig(certificate=certificate, key=key))
    print(json.dumps(next(serving)), flush=True)
    sys.stdin.read()
    next(serving, None)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
