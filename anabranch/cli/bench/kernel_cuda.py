"""Decode attention on an NVIDIA GPU beside the device's own read bandwidth and PyTorch's best kernels.

    python -c "import json; from anabranch.cli.bench.kernel_cuda import measure; print(json.dumps(measure()))"

Each sample walks at least 4 GiB of distinct cache, no byte twice; samples are taken in turn and timed by the
device's events, while `launch_s` is what a call costs the host. It has not been run: no GPU was at hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from workers.kernels.signature import LayerCache, Span
from workers.kernels.triton.kernel import TritonKernel

CACHE_BYTES_LEAST = 4 * 2**30
CONTEXTS = (32_768, 131_072, 262_144)
GROUPS = (1, 4, 8)
HEAD_SIZES = (64, 128)
KV_HEADS = 8
BLOCK_TOKENS = 32

_WARM_UP = 3
_HEAD_START_CYCLES = 4_000_000
"""The device idles this long before a sample, so that all launches are queued when it begins."""

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One shape: `sequences` of `context` tokens, one decoding row each."""

    dtype: torch.dtype
    head_size: int
    group: int
    context: int

    @property
    def name(self) -> str:
        """For example bfloat16_size128_group4_32768."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}_size{self.head_size}_group{self.group}_{self.context}"

    @property
    def sequence_bytes(self) -> int:
        """Keys and values of one sequence, one layer."""
        return 2 * self.context * KV_HEADS * self.head_size * self.dtype.itemsize

    @property
    def sequences(self) -> int:
        """As many as make up the least cache."""
        return -(-CACHE_BYTES_LEAST // self.sequence_bytes)


def cells(dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> list[Cell]:
    """Every dtype, head size, group and context."""
    return [
        Cell(dtype, head_size, group, context)
        for dtype in dtypes
        for head_size in HEAD_SIZES
        for group in GROUPS
        for context in CONTEXTS
    ]


def measure(repeats: int = 15) -> Results:
    """All cells, bfloat16. Raises RuntimeError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError("this process sees no CUDA device")
    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": {"name": properties.name, "memory_bytes": properties.total_memory},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "cells": {cell.name: measure_cell(cell, device, repeats) for cell in cells()},
    }


def measure_cell(cell: Cell, device: torch.device, repeats: int) -> Results:
    """Samples in seconds by kernel, and the ratios of their medians."""
    shape = (cell.sequences * cell.context // BLOCK_TOKENS, BLOCK_TOKENS, KV_HEADS, cell.head_size)
    key = torch.randn(shape, dtype=cell.dtype, device=device)
    cache = LayerCache(key, torch.randn_like(key))
    query = torch.randn(
        cell.sequences, KV_HEADS * cell.group, cell.head_size, dtype=cell.dtype, device=device
    )
    kernels = {
        "read_sum": lambda: _read(cache),
        "triton_adjacent": _triton(cell, query, cache, scattered=False),
        "triton_scattered": _triton(cell, query, cache, scattered=True),
        **_sdpa(cell, query, cache),
    }
    samples, launches = _in_turn(kernels, repeats)
    return {
        "bytes": cell.sequences * cell.sequence_bytes,
        "sequences": cell.sequences,
        "samples_s": samples,
        "launch_s": launches,
        **_ratios({name: statistics.median(values) for name, values in samples.items()}),
    }


def _ratios(median_s: Mapping[str, float]) -> Results:
    """Higher is better; triton's worse block table counts."""
    own_s = max(median_s["triton_adjacent"], median_s["triton_scattered"])
    peers = {name: value for name, value in median_s.items() if name.startswith("sdpa_")}
    return {
        "read_ratio": median_s["read_sum"] / own_s,
        "vs_sdpa": min(peers.values()) / own_s if peers else None,
        "best_sdpa": min(peers, key=lambda name: peers[name]) if peers else None,
    }


def _read(cache: LayerCache) -> None:
    """The probe: all of keys and values summed as they lie, as int32, of which the device adds enough."""
    for part in (cache.key, cache.value):
        part.view(torch.int32).sum(dtype=torch.int32)


def _triton(cell: Cell, query: Tensor, cache: LayerCache, *, scattered: bool) -> Callable[[], None]:
    """Our kernel; the blocks of all sequences in order, or in any."""
    count = cell.context // BLOCK_TOKENS
    total = cell.sequences * count
    blocks = torch.randperm(total) if scattered else torch.arange(total)
    spans = [
        Span(row, 1, cell.context, tuple(ids), 0, 0, cell.context)
        for row, ids in enumerate(blocks.view(cell.sequences, count).tolist())
    ]
    kernel, scale = TritonKernel(), cell.head_size**-0.5

    def attend() -> None:
        kernel.attend(query, spans, cache, scale)

    return attend


def _sdpa(cell: Cell, query: Tensor, cache: LayerCache) -> dict[str, Callable[[], None]]:
    """PyTorch's kernels that run here, over the same memory, the query heads of a KV head packed as rows."""
    shape = (cell.sequences, cell.context, KV_HEADS, cell.head_size)
    key, value = (part.view(shape).transpose(1, 2) for part in (cache.key, cache.value))
    packed = query.view(cell.sequences, KV_HEADS, cell.group, cell.head_size)

    def attend_with(backend: SDPBackend) -> Callable[[], None]:
        def attend() -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(packed, key, value)

        return attend

    kernels = {f"sdpa_{name}": attend_with(backend) for name, backend in _SDPA.items()}
    return {name: kernel for name, kernel in kernels.items() if _runs(kernel)}


def _runs(kernel: Callable[[], None]) -> bool:
    try:
        kernel()
        torch.cuda.synchronize()
    except RuntimeError:  # this backend does not serve this shape, or this device
        return False
    return True


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _in_turn(
    kernels: Mapping[str, Callable[[], None]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of the device for each, in rounds, and the median seconds of the host."""
    samples: dict[str, list[float]] = {name: [] for name in kernels}
    launches: dict[str, list[float]] = {name: [] for name in kernels}
    for turn in range(_WARM_UP + repeats):
        for name, kernel in kernels.items():
            began, ended = _event(), _event()
            torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
            began.record()
            began_s = perf_counter()
            kernel()
            launched_s = perf_counter() - began_s
            ended.record()
            ended.synchronize()
            if turn >= _WARM_UP:
                samples[name].append(began.elapsed_time(ended) / 1000)
                launches[name].append(launched_s)
    return samples, {name: statistics.median(values) for name, values in launches.items()}
