"""How fast the CPU kernel reads its cache, beside the memory's own speed and PyTorch's attention.

Each cell walks distinct cache, no byte read twice in a repetition, as the probes beside it do. Kernel, probe
and PyTorch take turns within a repetition, so that a ratio compares what ran under the same conditions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from workers.kernels.cpu import _native
from workers.kernels.cpu.kernel import CpuKernel, levels
from workers.kernels.memory import reserve
from workers.kernels.signature import CacheShape, LayerCache, Span
from workers.kernels.torch_flash import TorchKernel

_CPU = torch.device("cpu")
_KV_HEADS = 2
_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: `rows` query rows of every sequence over all of its tokens."""

    dtype: str
    head_size: int
    group: int
    rows: int
    threads: int

    @property
    def name(self) -> str:
        """As a key of the results."""
        return f"{self.dtype}/head{self.head_size}/group{self.group}/rows{self.rows}/threads{self.threads}"


@dataclass(frozen=True)
class Extent:
    """How much is walked, and how often."""

    tokens: int
    cache_bytes: int
    repeats: int


FULL = Extent(tokens=32768, cache_bytes=3 * 2**29, repeats=7)
QUICK = Extent(tokens=4096, cache_bytes=2**27, repeats=3)


def cells() -> Iterator[Cell]:
    """Those with targets first: decode in every type, then chunks, then what is reported only."""
    for threads in (1, 2):
        for dtype in ("bfloat16", "float32", "int8", "float16"):
            for head_size in (64, 128):
                for group in (1, 3, 4):
                    yield Cell(dtype, head_size, group, 1, threads)
        for rows in (64, 512):
            for dtype in ("bfloat16", "float32"):
                yield Cell(dtype, 64, 3, rows, threads)
        for head_size in (64, 128, 80, 96, 256):
            yield Cell("bfloat16", head_size, 8, 1, threads)


def measure(extent: Extent, chosen: Sequence[Cell]) -> dict[str, Any]:
    """{"levels", "extent", "cells": {name: figures}}; every ratio with the samples it comes from, in GB/s
    of cache or of probe read, and `ratio` the median over the repetitions of cell over best probe.
    """
    probe = reserve(extent.cache_bytes, _CPU)
    probe.fill_(1)
    results: dict[str, Any] = {"levels": list(levels()), "extent": asdict(extent), "cells": {}}
    before = torch.get_num_threads()
    try:
        for cell in chosen:
            torch.set_num_threads(cell.threads)
            results["cells"][cell.name] = asdict(cell) | _Walk(cell, extent).measure(probe)
    finally:
        torch.set_num_threads(before)
    return results


class _Walk:
    """A cell's caches in both layouts, filled with the same numbers, and its queries."""

    def __init__(self, cell: Cell, extent: Extent) -> None:
        self.cell, self.extent = cell, extent
        dtype = getattr(torch, cell.dtype)
        self.row_dtype = torch.float32 if dtype == torch.int8 else dtype
        scale_bytes = 4 if dtype == torch.int8 else 0
        token_bytes = 2 * _KV_HEADS * (cell.head_size * dtype.itemsize + scale_bytes)
        # Chunks compute for long: one sequence is walk enough, and PyTorch gets the same.
        sequences = max(1, extent.cache_bytes // (token_bytes * extent.tokens)) if cell.rows == 1 else 1
        self.tokens = sequences * extent.tokens
        self.cache_bytes = token_bytes * self.tokens
        self.kernel = CpuKernel(threads=cell.threads)
        shape = CacheShape(1, self.tokens // _BLOCK_TOKENS, _BLOCK_TOKENS, _KV_HEADS, cell.head_size, dtype)
        (self.cache,) = self.kernel.layout.allocate(shape, _CPU)
        self.plain = self._fill(shape)
        self.spans = list(self._spans(sequences))
        heads = _KV_HEADS * cell.group
        self.query = torch.randn(sequences * cell.rows, heads, cell.head_size).to(self.row_dtype)
        self.scale = cell.head_size**-0.5

    def _fill(self, shape: CacheShape) -> LayerCache:
        torch.manual_seed(0)
        part = torch.randn(2, self.extent.tokens, _KV_HEADS, self.cell.head_size).to(self.row_dtype)
        for start in range(0, self.tokens, self.extent.tokens):
            slots = torch.arange(start, start + self.extent.tokens)
            self.kernel.layout.append(self.cache, slots, part[0], part[1])
        sizes = (shape.blocks, _BLOCK_TOKENS, _KV_HEADS, self.cell.head_size)
        repeats = (self.tokens // self.extent.tokens, 1, 1)
        return LayerCache(part[0].repeat(repeats).view(sizes), part[1].repeat(repeats).view(sizes))

    def _spans(self, sequences: int) -> Iterator[Span]:
        per_sequence = self.extent.tokens // _BLOCK_TOKENS
        for index in range(sequences):
            blocks = tuple(range(index * per_sequence, (index + 1) * per_sequence))
            yield Span(
                index * self.cell.rows, self.cell.rows, self.extent.tokens, blocks, 0, 0, self.extent.tokens
            )

    def measure(self, probe: Tensor) -> dict[str, Any]:
        """Samples and ratios."""
        attend = self._run_kernel
        rivals: dict[str, Callable[[], object]] = {
            "kernel": attend,
            "avx_probe": lambda: _native.read_probe(probe, self.cell.threads, levels()[0]),
            "torch_sum": probe.view(torch.float32).sum,
            "torch_flash": self._run_torch,
        }
        attend()
        seconds: dict[str, list[float]] = {name: [] for name in rivals}
        for _ in range(self.extent.repeats):
            for name, run in rivals.items():
                began_s = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began_s)
        return self._figures(seconds, probe.numel())

    def _run_kernel(self) -> Tensor:
        return self.kernel.attend(self.query, self.spans, self.cache, self.scale).out

    def _run_torch(self) -> Tensor:
        return TorchKernel().attend(self.query, self.spans, self.plain, self.scale).out

    def _figures(self, seconds: dict[str, list[float]], probe_bytes: int) -> dict[str, Any]:
        read = [self.cache_bytes / second / 1e9 for second in seconds["kernel"]]
        probes = {
            name: [probe_bytes / second / 1e9 for second in seconds[name]]
            for name in ("avx_probe", "torch_sum")
        }
        best = [max(pair) for pair in zip(*probes.values(), strict=True)]
        flop = 4 * self.tokens * self.cell.rows * self.cell.head_size * self.cell.group * _KV_HEADS
        return {
            "cache_bytes": self.cache_bytes,
            "tokens": self.tokens,
            "read_gb_s": read,
            "probe_gb_s": probes,
            "read_ratio": statistics.median(a / b for a, b in zip(read, best, strict=True)),
            "kernel_s": seconds["kernel"],
            "torch_flash_s": seconds["torch_flash"],
            "vs_torch": statistics.median(
                theirs / ours for theirs, ours in zip(seconds["torch_flash"], seconds["kernel"], strict=True)
            ),
            "tokens_per_s": self.tokens / statistics.median(seconds["kernel"]),
            "gflop_per_s": flop / statistics.median(seconds["kernel"]) / 1e9,
            "error": self._error(),
        }

    def _error(self) -> float:
        """||out - expected|| / ||expected||, the worst row and head of the first rows, against float64."""
        rows, group = min(2, self.cell.rows), self.cell.group
        out = self._run_kernel()[:rows].double()
        slots = torch.arange(self.extent.tokens)
        key, value = (part.flatten(0, 1)[slots] for part in (self.plain.key, self.plain.value))
        worst = 0.0
        for head in range(_KV_HEADS * group):
            query = self.query[:rows, head].double()
            weights = (query @ key[:, head // group].double().T * self.scale).softmax(-1)
            expected = weights @ value[:, head // group].double()
            error = (out[:, head] - expected).norm(dim=-1) / expected.norm(dim=-1)
            worst = max(worst, float(error.max()))
        return worst
