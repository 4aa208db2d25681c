"""`anabranch doctor`: what this machine and the way to another one can do, and whether to split a model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli.bench import bare
from anabranch.cli.bench.table import quantity
from anabranch.cli.model import resolve
from cluster.errors import AnabranchError, InvalidRequest
from cluster.model_spec import ModelSpec
from cluster.perfmodel import DeviceSpeed, Forecast, ModelShape, Setting, forecast

_SMOLLM2 = ModelShape(weight_bytes=269e6, element_bytes=2, layers=30, hidden_size=576, query_group=3)
_DEFAULT_MODEL = "smollm2-135m-instruct"
_SMALL_BYTES, _LARGE_BYTES = 16 * 2**10, 4 * 2**20
_PROBE_BYTES_MOST = 2**30
_MATRIX = 1536
_DEFAULT_PORT = 8640


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured, and what follows."""

    cores: int
    memory_bytes: float
    read_bytes_per_s: float
    flops_per_s: float
    round_trip_s: float
    lane_bytes_per_s: float
    layers_round_trip_s: float
    forecast: Forecast


def doctor(
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where `anabranch doctor --serve` runs; default: this machine."
        ),
    ] = None,
    serve: Annotated[bool, typer.Option(help="Answer another machine's doctor until Ctrl-C.")] = False,
    host: Annotated[str, typer.Option(help="Address --serve binds.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port --serve binds.", min=0, max=65535)] = _DEFAULT_PORT,
    model: Annotated[str, typer.Option(help="A fetched model's name, or a folder.")] = _DEFAULT_MODEL,
    batch: Annotated[int, typer.Option(help="Sequences that decode at once.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of context of each.", min=1)] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure memory, arithmetic and the way to a peer; predict tokens/s; say whether to split, and why.

    Without --peer half of this machine's cores stand for each side; a peer is taken to be like this machine.

    \b
    anabranch doctor
    anabranch doctor --serve --host 10.0.0.2      # there
    anabranch doctor --peer 10.0.0.2:8640         # here
    """
    if serve:
        with bare.listen(host, port) as listener:
            print(f"listening on {host}:{listener.getsockname()[1]}", flush=True)
            bare.bounce_all(listener)
        return
    findings = examine(peer, shape_of(model), batch, context)
    if as_json:
        print(json.dumps(dataclasses.asdict(findings), indent=2))
    else:
        console = Console()
        console.print(_table(findings))
        console.print(findings.forecast.verdict, soft_wrap=True)


def shape_of(model: str) -> ModelShape:
    """What the equations need of a model, in 16 bit. Raises NotFound, but not for the default model."""
    try:
        spec = ModelSpec.from_folder(resolve(model))
    except AnabranchError:
        if model == _DEFAULT_MODEL:
            return _SMOLLM2
        raise
    group = spec.query_heads // spec.kv_heads
    return ModelShape(spec.parameters * 2, 2, spec.layers, spec.query_heads * spec.head_size, group)


def examine(peer: str | None, model: ModelShape, batch: int, context_tokens: int) -> Findings:
    """Measure, then predict. Raises InvalidRequest for an address that is none, Unavailable."""
    cores = len(os.sched_getaffinity(0))
    memory_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    read_bytes_per_s, flops_per_s = read_rate(cores), arithmetic_rate()
    round_trip_s, lane_bytes_per_s = way_to(peer)
    setting = Setting(
        DeviceSpeed(flops_per_s, read_bytes_per_s, memory_bytes),
        round_trip_s,
        lane_bytes_per_s,
        is_one_machine=peer is None,
    )
    return Findings(
        cores,
        memory_bytes,
        read_bytes_per_s,
        flops_per_s,
        round_trip_s,
        lane_bytes_per_s,
        model.layers * round_trip_s,
        forecast(model, batch, context_tokens, setting),
    )


def read_rate(threads: int) -> float:
    """Bytes per second that `threads` read from memory: the best of three sums over more than caches hold."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    words = np.ones(min(_PROBE_BYTES_MOST, available // 4) // 4, dtype=np.float32)
    parts = np.array_split(words, threads)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [_timed(lambda: list(pool.map(np.sum, parts))) for _ in range(3)]
    return words.nbytes / min(seconds)


def arithmetic_rate() -> float:
    """FLOP per second of a float32 matrix product on all cores."""
    matrix = np.ones((_MATRIX, _MATRIX), dtype=np.float32)
    return 2 * _MATRIX**3 / min(_timed(lambda: matrix @ matrix) for _ in range(4))


def way_to(peer: str | None) -> tuple[float, float]:
    """Seconds of a round trip of 16 KiB, and bytes per second of 4 MiB, to a peer or a process beside us."""
    if peer is not None:
        return _way(_address(peer))
    command = [sys.executable, "-m", "anabranch.cli", "doctor", "--serve", "--port", "0"]
    cores = sorted(os.sched_getaffinity(0))
    # On one core the two would never have to wake each other, as two roles must.
    os.sched_setaffinity(0, {cores[-1]})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.sched_setaffinity(0, {cores[0]})
        try:
            return _way(_address(process.stdout.readline().split()[-1]))
        finally:
            os.sched_setaffinity(0, cores)
            process.terminate()


def _way(address: tuple[str, int]) -> tuple[float, float]:
    medians = []
    for size, trips in ((_SMALL_BYTES, 300), (_LARGE_BYTES, 12)):
        with bare.connect(address, size) as connected:
            trip = bare.trip(connected, size)
            medians.append(statistics.median(_timed(trip) for _ in range(trips)))
    small_s, large_s = medians
    moving_s = max(large_s - small_s, large_s / 2)
    return small_s, 2 * _LARGE_BYTES / moving_s


def _address(peer: str) -> tuple[str, int]:
    name, _, port = peer.rpartition(":")
    if not name or not port.isdecimal():
        raise InvalidRequest(f"--peer {peer}: HOST:PORT is expected")
    return name.strip("[]"), int(port)


def _timed(work: Callable[[], object]) -> float:
    began_s = perf_counter()
    work()
    return perf_counter() - began_s


def _table(findings: Findings) -> Table:
    table = Table(box=box.SIMPLE, show_header=False)
    told = findings.forecast
    for name, text in (
        ("memory read", f"{quantity(findings.read_bytes_per_s, 'B/s')} on {findings.cores} cores"),
        ("float32 products", f"{findings.flops_per_s / 1e9:.0f} GFLOP/s"),
        ("round trip of 16 KiB", quantity(findings.round_trip_s, "s")),
        ("bandwidth at 4 MiB", quantity(findings.lane_bytes_per_s, "B/s")),
        ("layers x round trip", quantity(findings.layers_round_trip_s, "s")),
        ("monolithic, at most", f"{told.monolithic_tokens_per_s:.0f} tokens/s"),
        ("split, at most", f"{told.split_tokens_per_s:.0f} tokens/s"),
        ("a split step's bottleneck", told.bottleneck),
        (
            "sequences that fit here",
            "any" if math.isinf(told.sequences_held) else f"{told.sequences_held:.0f}",
        ),
    ):
        table.add_row(name, text)
    return table
