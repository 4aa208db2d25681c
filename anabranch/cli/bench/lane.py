"""`anabranch bench lane`: what a message to another process costs on each transport, both Python sides
included, in turn with the same bytes over a bare socket.

Lanes over sockets are measured as roles with cores of their own use them, asking for bytes for a moment
before they sleep, and, as `..._sleeping`, without. A sleeping lane pays for waking two processes, and more
than a bare loop does: where a virtual core has even 5 us of work between two waits, its next wake-up takes
longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from anabranch.cli.bench import bare, lane_peer
from anabranch.cli.bench.certificate import self_signed
from anabranch.cli.bench.namespaces import LOOPBACK, Way
from anabranch.cli.bench.records import Record, Results, figure, prediction, ratio
from anabranch.cli.bench.turns import in_turn
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import Unavailable
from cluster.types import Epoch, WorkerId
from workers.lanes.dial import Caller, dial
from workers.lanes.messages import Lane, LayerMessage

_SPIN_US = 50
_DEADLINE_MS = 10_000
_PLAIN = TlsConfig()

Trip = Callable[[], None]
"""One message there and one back."""


SMALL_ROWS, LARGE_ROWS = 4, 1024
"""16 KiB, as a layer of a small batch; 4 MiB, as a chunk."""


@dataclass(frozen=True, slots=True)
class LaneBench:
    """What is measured: messages of `rows` x 4 KiB, `trips` to a sample, `repeats` samples in turn."""

    rows: int
    trips: int
    repeats: int

    @property
    def payload_bytes(self) -> int:
        """Of a query; a reply has its log-sum-exps more."""
        return self.rows * lane_peer.ROW_BYTES


@dataclass(frozen=True, slots=True)
class Peers:
    """Peers whose lanes spin and peers whose sleep, and their certificate, if they have one. The near ones
    share our network, as local lanes ask.
    """

    host: str
    spinning: Mapping[str, Any]
    sleeping: Mapping[str, Any]
    near_spinning: Mapping[str, Any]
    near_sleeping: Mapping[str, Any]
    tls: TlsConfig


def measure(repeats: int, way: Way, trips: tuple[int, int] = (100, 3)) -> Results:
    """Seconds of a round trip by transport and size, and the ratios asked for. trips: to a sample, of small
    and of large messages.
    """
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        own_core, peer_core = stack.enter_context(_pinned_apart())
        tls, tls_told = _certificate(stack, way.host)
        far = [stack.enter_context(_peer(way, peer_core, spin_us, tls)) for spin_us in (_SPIN_US, 0)]
        near = far
        if way.prefix:
            plain = (_SPIN_US, _PLAIN), (0, _PLAIN)
            near = [stack.enter_context(_peer(LOOPBACK, peer_core, *each)) for each in plain]
        peers = Peers(way.host, far[0], far[1], near[0], near[1], tls)
        settings: dict[str, Any] = {
            "cores": [own_core, peer_core],
            "host": way.host,
            "network": way.network,
            "tls": tls_told,
            "spin_us": _SPIN_US,
        }
        small = sample(peers, LaneBench(SMALL_ROWS, trips[0], repeats))
        large = sample(peers, LaneBench(LARGE_ROWS, trips[1], repeats))
    return summary(small, large, settings)


def summary(
    small: Mapping[str, list[float]], large: Mapping[str, list[float]], settings: dict[str, Any]
) -> Results:
    """Records of all samples."""

    def over(
        samples: Mapping[str, list[float]],
        one: str,
        other: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Record:
        sides = (one, samples[one]), (other, samples[other])
        return ratio(*sides, "s", at_least=at_least, at_most=at_most, settings=settings)

    found = {
        "round_trip_16kib": _trips(small, settings),
        "round_trip_4mib": _trips(large, settings),
        "local_vs_bare": over(small, "local", "bare_unix", at_most=1.3),
        "local_vs_grpc": over(small, "local", "grpc", at_most=0.3),
        "local_sleeping_vs_bare": over(small, "local_sleeping", "bare_unix"),
        "tcp_vs_bare": over(small, "tcp", "bare_tcp", at_most=1.3),
        "tcp_sleeping_vs_bare": over(small, "tcp_sleeping", "bare_tcp"),
        # Throughput is bytes over time, so the bare loop's time stands above.
        "tcp_throughput_vs_bare": over(large, "bare_tcp", "tcp", at_least=0.7),
        "local_throughput_vs_bare": over(large, "bare_unix", "local"),
    }
    if "grpc_tls" in small:
        found["tls_vs_plain"] = over(small, "grpc_tls", "grpc")
        found["tls_throughput_vs_plain"] = over(large, "grpc", "grpc_tls")
    return found


def _trips(samples: Mapping[str, list[float]], settings: dict[str, Any]) -> Results:
    """Each lane's floor is one round trip of the bare loop of its family at its best; that one sleeps, so a
    lane that does not may go below it.
    """
    found: Results = {}
    for name, taken in samples.items():
        bare_loop = "bare_unix" if name.startswith("local") else "bare_tcp"
        floor = prediction("lane_floor_s", {"layers": 1, "round_trip_s": min(samples[bare_loop])})
        is_bare = name.startswith("bare")
        found[name] = figure(taken, "s", floor=None if is_bare else floor, settings=settings)
    return found


def sample(peers: Peers, bench: LaneBench) -> dict[str, list[float]]:
    """Seconds of one round trip on each transport; a sample is the median of `bench.trips`."""
    spinning, sleeping = peers.spinning["address"], peers.sleeping["address"]
    near_spinning, near_sleeping = peers.near_spinning["address"], peers.near_sleeping["address"]
    with contextlib.ExitStack() as stack:
        trips: dict[str, Trip] = {
            "bare_unix": _bare(stack, peers.near_sleeping["bare_unix"], bench),
            "bare_tcp": _bare(stack, (peers.host, peers.sleeping["bare_tcp"]), bench),
            "local": _over(_lane(stack, near_spinning, "local", _SPIN_US), bench),
            "tcp": _over(_lane(stack, spinning, "tcp", _SPIN_US), bench),
            "local_sleeping": _over(_lane(stack, near_sleeping, "local", 0), bench),
            "tcp_sleeping": _over(_lane(stack, sleeping, "tcp", 0), bench),
            "grpc": _over(_lane(stack, sleeping, "grpc", 0), bench),
        }
        if peers.tls.enabled:
            secure = _lane(stack, peers.sleeping["address_tls"], "grpc", 0, peers.tls)
            trips["grpc_tls"] = _over(secure, bench)
        return in_turn({name: _timed(trip, bench.trips) for name, trip in trips.items()}, bench.repeats)


def _certificate(stack: contextlib.ExitStack, host: str) -> tuple[TlsConfig, str]:
    """For the lane with TLS; nothing where none can be made, and why."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-bench-"))
    try:
        return self_signed(Path(folder), host), "gRPC lane, self-signed P-256"
    except Unavailable as error:
        return TlsConfig(), error.message


def _timed(trip: Trip, trips: int) -> Callable[[], float]:
    def sample() -> float:
        seconds = []
        for _ in range(trips):
            began_s = perf_counter()
            trip()
            seconds.append(perf_counter() - began_s)
        return statistics.median(seconds)

    return sample


def _lane(
    stack: contextlib.ExitStack, address: str, transport: str, spin_us: int, tls: TlsConfig = _PLAIN
) -> Lane:
    """A lane to a peer, closed with the stack."""
    channel = stack.enter_context(rpc.channel(address, tls))
    caller = Caller(
        WorkerId("bench"),
        Epoch(1),
        lane_peer.GEOMETRY,
        (transport,),
        lane_peer.ROWS_MOST,
        spin_us / 1e6,
    )
    lane = dial(channel, address, lane_peer.EPOCH, caller)
    stack.callback(lane.close)
    return lane


def _over(lane: Lane, bench: LaneBench) -> Trip:
    """A query and its reply, as one layer of a step sends and takes them."""
    query = torch.zeros(bench.rows, lane_peer.GEOMETRY.query_heads, lane_peer.GEOMETRY.head_size)
    deadline_s = perf_counter() + 3600
    step = 0

    def trip() -> None:
        nonlocal step
        step += 1
        lane.send(LayerMessage(step, 0, 0, _DEADLINE_MS, query=query))
        lane.receive(step, 0, 0, deadline_s)

    return trip


def _bare(stack: contextlib.ExitStack, address: str | tuple[str, int], bench: LaneBench) -> Trip:
    """The same bytes with nothing around them."""
    connected = stack.enter_context(bare.connect(address, bench.payload_bytes))
    return bare.trip(connected, bench.payload_bytes)


@contextlib.contextmanager
def _pinned_apart() -> Iterator[tuple[int, int]]:
    """A core for this process and one for the peer: the same one where there is no other."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield cores[0], cores[-1]
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _peer(way: Way, core: int, spin_us: int, tls: TlsConfig) -> Iterator[Mapping[str, Any]]:
    """The other process; ends with the block. Raises Unavailable when it does not come up."""
    module = [sys.executable, "-m", lane_peer.__name__, way.host, str(core), str(spin_us)]
    if tls.certificate is not None and tls.key is not None:
        module += [tls.certificate, tls.key]
    with subprocess.Popen(
        [*way.prefix, *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise Unavailable("the other process of the bench ended; what it wrote stands above")
            yield json.loads(line)
        finally:
            process.stdin.close()
