"""The attention kernel's measurement: every cell beside the memory's own speed and PyTorch's."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from workers.kernels.measure import FULL, QUICK, cells, measure


def bench_kernel(quick: bool = False) -> dict[str, Any]:
    """Measure all cells (minutes), or a small part of the memory in each (`quick`: for a try only, since it
    fits a large cache). Nested plain values: `levels`, `extent`, `cells`, and the summary under the names
    of the types: `bfloat16.read_ratio_min`, `bfloat16.vs_torch_min`, `int8.vs_bfloat16`, ...
    """
    results = measure(QUICK if quick else FULL, list(cells()))
    figures: list[dict[str, Any]] = list(results["cells"].values())
    for dtype in ("bfloat16", "float32", "float16", "int8"):
        aimed = [cell for cell in _decode(figures, dtype) if cell["group"] <= 4]
        results[dtype] = {
            "read_ratio_min": min(cell["read_ratio"] for cell in aimed),
            "vs_torch_min": min(cell["vs_torch"] for cell in aimed),
            "error_max": max(cell["error"] for cell in aimed),
        }
    results["int8"]["vs_bfloat16"] = _quantised_gain(figures)
    return results


def _decode(figures: Iterable[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    return [cell for cell in figures if cell["dtype"] == dtype and cell["rows"] == 1]


def _quantised_gain(figures: list[dict[str, Any]]) -> float:
    """Median over shapes of int8's tokens per second over bfloat16's."""
    full: dict[tuple[int, int, int], float] = {
        _shape(cell): cell["tokens_per_s"] for cell in _decode(figures, "bfloat16")
    }
    gains: list[float] = [cell["tokens_per_s"] / full[_shape(cell)] for cell in _decode(figures, "int8")]
    return statistics.median(gains)


def _shape(cell: dict[str, Any]) -> tuple[int, int, int]:
    return cell["head_size"], cell["group"], cell["threads"]
