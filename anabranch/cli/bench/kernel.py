"""`anabranch bench kernel`: the attention kernel beside the memory's own speed and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from anabranch.cli.bench.records import Record, Results, extreme, figure, prediction, ratio
from workers.kernels.measure import FULL, QUICK, Cell, cells, measure

_READ_LEAST = 0.85
_TORCH_LEAST = 2.0
_QUANTISED_LEAST = 1.5
_CHUNK_LEAST = 1.0
_GROUP_AIMED = 4
"""Up to this many query heads a KV head reading the cache is what takes the time; beyond, computing is."""

_NAMES = {"bfloat16": "bf16"}


def bench_kernel(quick: bool, tell: Callable[[str], None]) -> Results:
    """Measure all cells (some ten minutes), or a small part of the memory in each (`quick`: for a try only,
    since it fits a large cache). `tell` hears which cell is measured.
    """
    extent = QUICK if quick else FULL
    measured: dict[Cell, dict[str, Any]] = {}
    for cell in cells():
        tell(f"kernel: {cell.name}")
        measured[cell] = measure(extent, [cell])["cells"][cell.name]
    return {"kernel": summary(measured)}


def summary(measured: dict[Cell, dict[str, Any]]) -> Results:
    """The worst of each kind over its cells, all of which are kept with their samples."""
    found: Results = {}
    for dtype in dict.fromkeys(cell.dtype for cell in measured):
        aimed = {
            cell: figures
            for cell, figures in measured.items()
            if cell.dtype == dtype and cell.rows == 1 and cell.group <= _GROUP_AIMED
        }
        if aimed:
            found[_NAMES.get(dtype, dtype)] = _decoding(dtype, aimed)
    if "int8" in found and "bf16" in found:
        found["int8"]["vs_bf16"] = _quantised_gain(measured)
    chunks = {
        cell.name: _vs_torch(figures, _CHUNK_LEAST) for cell, figures in measured.items() if cell.rows > 1
    }
    if chunks:
        found["chunks"] = {"vs_torch_min": extreme("least", chunks, at_least=_CHUNK_LEAST)}
    found["reported"] = {
        cell.name: _reported(figures) for cell, figures in measured.items() if cell.group > _GROUP_AIMED
    }
    return found


def _decoding(dtype: str, aimed: dict[Cell, dict[str, Any]]) -> Results:
    is_asked = dtype in ("bfloat16", "float32")
    reads = {
        cell.name: _vs_probe(figures, _READ_LEAST if is_asked else None) for cell, figures in aimed.items()
    }
    torch_least = _TORCH_LEAST if dtype == "bfloat16" else None
    rivals = {cell.name: _vs_torch(figures, torch_least) for cell, figures in aimed.items()}
    errors = [float(figures["error"]) for figures in aimed.values()]
    return {
        "read_ratio_min": extreme("least", reads, at_least=_READ_LEAST if is_asked else None),
        "vs_torch_min": extreme("least", rivals, at_least=torch_least),
        "seconds": {cell.name: _seconds(figures) for cell, figures in aimed.items()},
        "error_max": figure([max(errors)], ""),
    }


def _seconds(figures: dict[str, Any]) -> Record:
    """Of one walk over the cache, above what the faster probe would take for it at its best."""
    bandwidth = 1e9 * max(max(samples) for samples in figures["probe_gb_s"].values())
    inputs = {"read_bytes": figures["cache_bytes"], "bandwidth_bytes_per_s": bandwidth}
    return figure(figures["kernel_s"], "s", floor=prediction("read_floor_s", inputs))


def _vs_probe(figures: dict[str, Any], least: float | None) -> Record:
    """Cache bytes read per second over the better probe's, repetition by repetition."""
    best = [max(pair) for pair in zip(*figures["probe_gb_s"].values(), strict=True)]
    return ratio(("kernel", figures["read_gb_s"]), ("better probe", best), "GB/s", at_least=least)


def _vs_torch(figures: dict[str, Any], least: float | None) -> Record:
    sides = ("PyTorch", figures["torch_flash_s"]), ("kernel", figures["kernel_s"])
    return ratio(*sides, "s", at_least=least)


def _quantised_gain(measured: dict[Cell, dict[str, Any]]) -> Record:
    """int8's tokens per second over bfloat16's, the least over shapes and threads."""
    speeds = {cell: _tokens_per_s(figures) for cell, figures in measured.items() if cell.rows == 1}
    gains = {
        cell.name: ratio(("int8", speed), ("bf16", speeds[full]), "tok/s", at_least=_QUANTISED_LEAST)
        for cell, speed in speeds.items()
        if cell.dtype == "int8" and (full := _as_bfloat16(cell)) in speeds
    }
    return extreme("least", gains, at_least=_QUANTISED_LEAST)


def _tokens_per_s(figures: dict[str, Any]) -> list[float]:
    seconds: Iterable[float] = figures["kernel_s"]
    return [figures["tokens"] / second for second in seconds]


def _as_bfloat16(cell: Cell) -> Cell:
    return Cell("bfloat16", cell.head_size, cell.group, cell.rows, cell.threads)


def _reported(figures: dict[str, Any]) -> Results:
    """What has no target: its share of the memory's speed and its arithmetic."""
    return {
        "read_ratio": _vs_probe(figures, None),
        "seconds": _seconds(figures),
        "gflop_per_s": figure([figures["gflop_per_s"]], "GFLOP/s"),
        "error": figure([figures["error"]], ""),
    }
