"""`anabranch bench product`: products of few and many rows with packed weights, beside memory and oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from anabranch.cli.bench.records import Record, Results, figure, prediction, ratio
from cluster.errors import ConfigError
from workers.dense.weights import Projection, projection
from workers.kernels.memory import Slabs, reserve
from workers.kernels.select import has_compiled_code, let_threads_spin

_SHAPES = ((576, 576), (384, 576), (576, 576), (3072, 576), (576, 1536))
"""(outputs, inputs) of a layer of SmolLM2-135M."""
_LAYERS = 80
"""As many as are larger than a last-level cache: 566 MB."""
_ROWS = (1, 4, 8, 32, 128, 1024)
_READING_ROWS = 32
"""Up to this many reading the weights is what takes the time."""
_CPU = torch.device("cpu")

Call = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Seconds:
    """Of each pass, taken in turn."""

    ours: list[float]
    onednn: list[float]
    probe: list[float]


def measure(repeats: int, tell: Callable[[str], None]) -> Results:
    """`product`: by threads and rows, share of the memory's read speed and times oneDNN's speed. Raises
    ConfigError where one of both products is missing.
    """
    if not has_compiled_code() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ConfigError(
            "bench product compares our compiled products with oneDNN's bfloat16: one is missing"
        )
    let_threads_spin()
    tell("packing weights")
    slabs = Slabs()
    weights = [torch.randn(shape).bfloat16() for _ in range(_LAYERS) for shape in _SHAPES]
    ours = [projection(weight, None, slabs) for weight in weights]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 8) for weight in weights]
    weight_bytes = sum(weight.nbytes for weight in weights)
    probe = reserve(weight_bytes, _CPU)
    probe.fill_(1)
    before, found = torch.get_num_threads(), dict[str, Record]()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in _ROWS:
                tell(f"product: {rows} rows, {threads} threads")
                seconds = _take_turns(repeats, *_passes(rows, threads, ours, packed, probe))
                found[f"rows{rows}/threads{threads}"] = _told(seconds, rows, weight_bytes)
    finally:
        torch.set_num_threads(before)
    return {"product": found}


def _passes(
    rows: int, threads: int, ours: list[Projection], packed: list[Tensor], probe: Tensor
) -> Iterator[Call]:
    """One pass over all weights with each product, and over as many bytes with nothing else to do."""
    from workers.kernels.cpu import _native  # only now: `measure` has seen that it is there

    inputs = {size: torch.randn(rows, size).bfloat16() for _, size in _SHAPES}
    sizes = [size for _ in range(_LAYERS) for _, size in _SHAPES]

    def with_ours() -> None:
        for product, size in zip(ours, sizes, strict=True):
            product(inputs[size])

    def with_onednn() -> None:
        for weight, size in zip(packed, sizes, strict=True):
            torch.ops.mkldnn._linear_pointwise(inputs[size], weight, None, "none", [], "")

    yield with_ours
    yield with_onednn
    yield partial(_native.read_probe, probe, threads, _native.levels()[0])


def _take_turns(repeats: int, *passes: Call) -> _Seconds:
    """Seconds of each pass; the first round is thrown away."""
    seconds: list[list[float]] = [[] for _ in passes]
    with torch.inference_mode():
        for number in range(1 + repeats):
            for call, taken in zip(passes, seconds, strict=True):
                began_s = perf_counter()
                call()
                if number:
                    taken.append(perf_counter() - began_s)
    return _Seconds(*seconds)


def _told(seconds: _Seconds, rows: int, weight_bytes: int) -> Results:
    bandwidth = weight_bytes / min(seconds.probe)
    floor = prediction("read_floor_s", {"read_bytes": weight_bytes, "bandwidth_bytes_per_s": bandwidth})
    found: Results = {
        "seconds": figure(seconds.ours, "s", floor=floor),
        "vs_onednn": ratio(("oneDNN", seconds.onednn), ("ours", seconds.ours), "s"),
    }
    if rows <= _READING_ROWS:
        found["read_ratio"] = ratio(("read probe", seconds.probe), ("ours", seconds.ours), "s")
    return found
