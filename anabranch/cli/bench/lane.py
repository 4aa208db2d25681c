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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from anabranch.cli.bench import bare, lane_peer
from anabranch.cli.bench.records import Record, Results, figure, ratio
from anabranch.cli.bench.turns import in_turn
from cluster import rpc
from cluster.config import TlsConfig
from cluster.types import Epoch, WorkerId
from workers.lanes.dial import Caller, dial
from workers.lanes.messages import Lane, LayerMessage

_SPIN_US = 50
_DEADLINE_MS = 10_000

Trip = Callable[[], None]
"""One message there and one back."""


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


def measure(repeats: int, host: str = "127.0.0.1", peer_prefix: Sequence[str] = ()) -> Results:
    """Seconds of a round trip by transport and size, and the ratios asked for."""
    torch.set_num_threads(1)
    with (
        _pinned_apart() as (own_core, peer_core),
        _peer(host, peer_core, peer_prefix, _SPIN_US) as spinning,
        _peer(host, peer_core, peer_prefix, 0) as sleeping,
    ):
        settings: dict[str, Any] = {
            "cores": [own_core, peer_core],
            "host": host,
            "peer_prefix": list(peer_prefix),
        }
        settings["spin_us"] = _SPIN_US
        small = _sample(spinning, sleeping, host, LaneBench(rows=4, trips=100, repeats=repeats))
        large = _sample(spinning, sleeping, host, LaneBench(rows=1024, trips=3, repeats=repeats))
    return _results(small, large, settings)


def _results(
    small: Mapping[str, list[float]], large: Mapping[str, list[float]], settings: dict[str, Any]
) -> Results:
    trips = {name: figure(samples, "s", settings=settings) for name, samples in small.items()}
    trips_large = {name: figure(samples, "s", settings=settings) for name, samples in large.items()}

    def over(
        samples: Mapping[str, list[float]],
        one: str,
        other: str,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Record:
        sides = (one, samples[one]), (other, samples[other])
        return ratio(*sides, "s", at_least=at_least, at_most=at_most, settings=settings)

    return {
        "round_trip_16kib": trips,
        "round_trip_4mib": trips_large,
        "local_vs_bare": over(small, "local", "bare_unix", at_most=1.3),
        "local_vs_grpc": over(small, "local", "grpc", at_most=0.3),
        "local_sleeping_vs_bare": over(small, "local_sleeping", "bare_unix"),
        "tcp_vs_bare": over(small, "tcp", "bare_tcp", at_most=1.3),
        "tcp_sleeping_vs_bare": over(small, "tcp_sleeping", "bare_tcp"),
        # Throughput is bytes over time, so the bare loop's time stands above.
        "tcp_throughput_vs_bare": over(large, "bare_tcp", "tcp", at_least=0.7),
        "local_throughput_vs_bare": over(large, "bare_unix", "local"),
    }


def _sample(
    spinning: Mapping[str, Any], sleeping: Mapping[str, Any], host: str, bench: LaneBench
) -> dict[str, list[float]]:
    """Seconds of one round trip on each transport; a sample is the median of `bench.trips`."""
    with contextlib.ExitStack() as stack:
        trips: dict[str, Trip] = {
            "bare_unix": _bare(stack, sleeping["bare_unix"], bench),
            "bare_tcp": _bare(stack, (host, sleeping["bare_tcp"]), bench),
            "local": _over(_lane(stack, spinning["address"], "local", _SPIN_US), bench),
            "tcp": _over(_lane(stack, spinning["address"], "tcp", _SPIN_US), bench),
            "local_sleeping": _over(_lane(stack, sleeping["address"], "local", 0), bench),
            "tcp_sleeping": _over(_lane(stack, sleeping["address"], "tcp", 0), bench),
            "grpc": _over(_lane(stack, sleeping["address"], "grpc", 0), bench),
        }
        return in_turn({name: _timed(trip, bench.trips) for name, trip in trips.items()}, bench.repeats)


def _timed(trip: Trip, trips: int) -> Callable[[], float]:
    def sample() -> float:
        seconds = []
        for _ in range(trips):
            began_s = perf_counter()
            trip()
            seconds.append(perf_counter() - began_s)
        return statistics.median(seconds)

    return sample


def _lane(stack: contextlib.ExitStack, address: str, transport: str, spin_us: int) -> Lane:
    """A lane to a peer, closed with the stack."""
    channel = stack.enter_context(rpc.channel(address, TlsConfig()))
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
def _peer(host: str, core: int, prefix: Sequence[str], spin_us: int) -> Iterator[Mapping[str, Any]]:
    """The other process; ends with the block."""
    module = [sys.executable, "-m", lane_peer.__name__, host, str(core), str(spin_us)]
    with subprocess.Popen(
        [*prefix, *module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.stdin.close()
