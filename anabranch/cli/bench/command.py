"""The commands of `anabranch bench`; each measures in a module of its own and reports here.

A bench is a function that returns results (`records`); its command adds options, calls it and gives what it
returned to `report`. Benches are imported when called: they need torch, whose import takes seconds.
"""

from __future__ import annotations

import enum
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.bench import results_file
from anabranch.cli.bench.records import Results, differences, misses, records
from anabranch.cli.bench.table import results_table
from cluster.errors import InvalidRequest


class KernelDevice(enum.Enum):
    """Where `kernel` attends."""

    CPU = "cpu"
    CUDA = "cuda"


class LongDtype(enum.Enum):
    """Types `long-decode` has a bound for."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


app = typer.Typer(
    help="Measure the hot path, in turn with what it is compared to.",
    no_args_is_help=True,
)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results into FILE, beside other benches'."),
]


_BENCHES_IN_FILE = frozenset({"kernel", "product", "lane", "step", "gain", "context", "serve"})
"""What `make bench` and `make bench-peers` write."""

_BENCHES_ON_GPU = frozenset({"kernel_cuda"})

_WIDTH = 112
"""A table narrower than this would cut its figures; a narrow terminal wraps it."""


def report(results: Results, json_file: Path | None) -> None:
    """Print the table, and write the file if one is asked for."""
    stamped = results_file.stamp(results)
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(results_table(stamped))
    if json_file is not None:
        results_file.write(json_file, stamped)


def _say_lines() -> Callable[[str], None]:
    """Progress as lines that stay, each with the minutes since the start: some benches take twenty."""
    began_s = perf_counter()

    def say(line: str) -> None:
        print(f"{(perf_counter() - began_s) / 60:5.1f} min  {line}", file=sys.stderr, flush=True)

    return say


@app.command()
def kernel(
    json_file: JsonFile = None,
    device: Annotated[
        KernelDevice, typer.Option(help="cpu: the C++ kernels. cuda: Triton's, on an NVIDIA GPU.")
    ] = KernelDevice.CPU,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="On the CPU, a little memory only: for a try, since a large cache holds it."
        ),
    ] = False,
) -> None:
    """Attention over a cache larger than any processor's, beside what the memory gives and PyTorch's kernel.

    \b
    anabranch bench kernel --quick
    anabranch bench kernel --json bench/results.json
    anabranch bench kernel --device cuda --json bench/gpu.json
    """
    with Console(stderr=True).status("starting") as status:
        if device is KernelDevice.CUDA:
            from anabranch.cli.bench.kernel_cuda import bench_kernel_cuda

            results = bench_kernel_cuda(status.update)
        else:
            from anabranch.cli.bench.kernel import bench_kernel

            results = bench_kernel(quick, status.update)
    report(results, json_file)


@app.command()
def product(
    json_file: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Passes over all weights of each kind, in turn.", min=1)] = 7,
) -> None:
    """Products of rows with packed bfloat16 weights, beside what the memory gives and oneDNN's.

    \b
    anabranch bench product --json bench/results.json
    """
    from anabranch.cli.bench.product import measure

    with Console(stderr=True).status("starting") as status:
        results = measure(repeats, status.update)
    report(results, json_file)


@app.command()
def context(
    json_file: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Samples of each length, taken in turn.", min=1)] = 7,
) -> None:
    """Attention seconds and cache memory per token of context, 1k to 256k: the line, and what workers divide.

    \b
    anabranch bench context --json bench/results.json
    """
    from anabranch.cli.bench.context import ContextBench, measure

    with Console(stderr=True).status("starting") as status:
        results = measure(ContextBench(repeats=repeats), status.update)
    report(results, json_file)


@app.command()
def lane(
    json_file: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Samples of each transport, taken in turn.", min=1)] = 31,
    host: Annotated[
        str,
        typer.Option(help="Address the peer listens on; default: one in a network namespace of its own."),
    ] = "",
    peer_prefix: Annotated[
        str,
        typer.Option(help="With --host, put before the peer's command, for example `ip netns exec NAME`."),
    ] = "",
) -> None:
    """Round trips of 16 KB and 4 MB on each lane beside bare sockets; one core for each of the two processes.

    Root gets the peer into a network namespace behind a veth pair, made and removed here, so that TCP passes
    through two hosts' stacks; everyone else measures loopback, and the results say so.

    \b
    anabranch bench lane
    anabranch bench lane --host 127.0.0.1 --json bench/results.json
    anabranch bench lane --peer-prefix "ip netns exec b" --host 10.0.0.2
    """
    from anabranch.cli.bench.lane import measure
    from anabranch.cli.bench.namespaces import Way, way_to_peer

    if host:
        asked = Way(host, tuple(shlex.split(peer_prefix)), f"{peer_prefix or 'no prefix'}, {host}")
        report({"lane": measure(repeats, asked)}, json_file)
        return
    with way_to_peer() as way:
        print(f"lane: {way.network}", file=sys.stderr)
        results = measure(repeats, way)
    report({"lane": results}, json_file)


@app.command()
def step(
    json_file: JsonFile = None,
    repeats: Annotated[int, typer.Option(help="Turns of each mode.", min=1)] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw two steps: dense work, lane and attention.")
    ] = None,
) -> None:
    """Decoding steps of SmolLM2, monolithic and split over two cores, and what the model predicts of them.

    \b
    anabranch bench step
    anabranch bench step --plot step.png --json bench/results.json
    """
    from anabranch.cli.bench.step import measure

    with Console(stderr=True).status("starting") as status:
        results = measure(repeats, status.update, plot)
    report(results, json_file)


@app.command()
def serve(
    json_file: JsonFile = None,
    model: Annotated[str, typer.Option(help="Folder, or a name known to `anabranch model list`.")] = (
        "smollm2-135m-instruct"
    ),
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Compute threads of each contender.", min=1)] = 2,
    step_tokens: Annotated[int, typer.Option(help="Our token budget of a step.", min=64)] = 1024,
    repeats: Annotated[int, typer.Option(help="Rounds of each cell, contenders in turn.", min=1)] = 3,
    cells: Annotated[
        str, typer.Option(help="BATCHxPROMPT, separated by commas; default: all that are recorded.")
    ] = "",
    sweep_cells: Annotated[
        str, typer.Option(help="Cells by which each peer's settings are chosen; default: 8x128,4x2048.")
    ] = "",
    peers: Annotated[
        str | None, typer.Option(help="Python of the peers' environment, which `make bench-peers` makes.")
    ] = None,
) -> None:
    """Decode and prefill tokens per second of whole batches, ours beside vLLM's and transformers'.

    \b
    anabranch bench serve --cells 1x128,8x128
    anabranch bench serve --peers .venv-peers/bin/python --json bench/results.json
    """
    from anabranch.cli.bench.serve import CELLS, ServeBench, cell_of, measure
    from anabranch.cli.bench.sweep import SWEEP_CELLS
    from anabranch.cli.model import resolve

    chosen = tuple(map(cell_of, cells.split(","))) if cells else CELLS
    tried = tuple(map(cell_of, sweep_cells.split(","))) if sweep_cells else SWEEP_CELLS
    bench = ServeBench(str(resolve(model)), dtype, threads, step_tokens, repeats, chosen, peers, tried)
    report(measure(bench, _say_lines()), json_file)


@app.command()
def directory(
    json_file: JsonFile = None,
    workers: Annotated[int, typer.Option(help="Attention workers that report.", min=1)] = 1000,
    blocks: Annotated[int, typer.Option(help="Sealed blocks of each.", min=2)] = 1000,
    redis: Annotated[
        str, typer.Option(metavar="PROGRAM", help="Redis server for the copy; left out where there is none.")
    ] = "redis-server",
) -> None:
    """Reports a controller takes per second, heartbeats it answers, memory of what it knows, and a question
    about a prefix; the same of the copy that it keeps in a Redis.

    \b
    anabranch bench directory
    anabranch bench directory --workers 100 --blocks 1000 --redis valkey-server
    """
    from anabranch.cli.bench import directory as bench
    from anabranch.cli.bench import directory_copy

    results = bench.measure(workers, blocks)
    if shutil.which(redis):
        results |= directory_copy.measure(redis, workers, blocks)
    else:
        sys.stderr.write(f"no {redis} here: the copy is left out (--redis PROGRAM)\n")
    report({"directory": results}, json_file)


@app.command()
def prefix(
    json_file: JsonFile = None,
    model: Annotated[str, typer.Option(help="Folder, or a name known to `anabranch model list`.")] = (
        "smollm2-135m-instruct"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens of the common prefix.", min=64)] = 2000,
    repeats: Annotated[int, typer.Option(help="Prefixes, each computed once and found once.", min=1)] = 5,
) -> None:
    """Time to the first token where another dense worker has computed the prefix, beside where nobody has.

    \b
    anabranch bench prefix
    anabranch bench prefix --tokens 500 --repeats 3
    """
    from anabranch.cli.bench.prefix import measure
    from anabranch.cli.model import resolve

    report({"prefix": measure(str(resolve(model)), tokens, repeats)}, json_file)


@app.command()
def long_prefill(
    json_file: JsonFile = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1024)] = 2**18,
    workers: Annotated[int, typer.Option(help="Attention workers.", min=1, max=16)] = 2,
    step_tokens: Annotated[int, typer.Option(help="Token budget of a step.", min=64, max=65536)] = 1024,
) -> None:
    """A prompt of 262,144 tokens computed whole, on a tiny random model of 2 layers over attention workers.

    Takes some minutes on two cores, and at most 2 GiB of memory with all its processes.

    \b
    anabranch bench long-prefill --tokens 32768
    anabranch bench long-prefill --json bench/long.json
    """
    from anabranch.cli.bench.long_prefill import measure

    with Console(stderr=True).status("starting") as status:
        results = measure(tokens, workers, step_tokens, status.update)
    report(results, json_file)


@app.command()
def long_decode(
    json_file: JsonFile = None,
    tokens: Annotated[int, typer.Option(help="Cached tokens before the first one.", min=4096)] = 1_900_000,
    steps: Annotated[int, typer.Option(help="Tokens decoded.", min=2, max=1024)] = 16,
    workers: Annotated[int, typer.Option(help="Attention workers.", min=1, max=16)] = 4,
    dtype: Annotated[LongDtype, typer.Option(help="Of cache and model.")] = LongDtype.BFLOAT16,
) -> None:
    """Decoding behind 1,900,000 tokens of a cache with generated contents, every output checked in float64.

    A check of the attention path (scheduler, lanes, attention workers, merging), not of a model's quality.
    Takes some minutes; with all its processes at most 8 GiB of memory, of which the cache is 3.6 GiB.

    \b
    anabranch bench long-decode --tokens 20000
    anabranch bench long-decode --json bench/long.json
    """
    from anabranch.cli.bench.long_decode import measure

    with Console(stderr=True).status("starting") as status:
        results = measure(tokens, steps, workers, dtype.value, status.update)
    report(results, json_file)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="What `--json` wrote.")],
) -> None:
    """Compute every number of a results file again from the samples beside it; a difference is an error.

    What misses its target, and what was not measured, is listed.
    """
    results = results_file.read(file)
    found = differences(results)
    if found:
        raise InvalidRequest(f"{file}: {len(found)} differ:\n  " + "\n  ".join(found))
    print(f"{file}: {sum(1 for _ in records(results))} records follow from their samples")
    for line in misses(results):
        print(f"misses  {line}")
    expected = _BENCHES_ON_GPU if "gpu" in results.get("machine", {}) else _BENCHES_IN_FILE
    for bench in expected - results.keys():
        print(f"absent  {bench}")
