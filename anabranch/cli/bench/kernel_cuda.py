"""Decode attention on an NVIDIA GPU beside the device's own read bandwidth and PyTorch's best kernels.

Each sample walks at least 4 GiB of distinct cache, no byte twice; samples are taken in turn and timed by the
device's events, while `launch_s` is what a call costs the host.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anabranch.cli.bench.records import Record, Results, extreme, figure, prediction, ratio
from cluster.errors import ConfigError
from workers.kernels.signature import LayerCache, Span
from workers.kernels.triton.kernel import TritonKernel

CACHE_BYTES_LEAST = 4 * 2**30
CONTEXTS = (32_768, 131_072, 262_144)
GROUPS = (1, 4, 8)
HEAD_SIZES = (64, 128)
KV_HEADS = 8
BLOCK_TOKENS = 32

CHUNK_ROWS = 4096

_CHUNK_GROUP = 4
_WARM_UP = 3
_REPEATS = 15
_HEAD_START_CYCLES = 4_000_000
"""The device idles this long before a sample, so that all launches are queued when it begins."""

_OWN = ("triton_adjacent", "triton_scattered")
_PROBES = ("read_sum", "read_loop")
_STRETCH = 2**18
_PROBE_TILE = 2**13
"""Numbers a program of the probe sums, and how many at once: 1 MiB, 32 KiB."""

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

_READ_LEAST = 0.85
_SDPA_LEAST = 1.0

Samples = dict[str, list[float]]


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
    def read_bytes(self) -> int:
        """Of a walk over the cache of all sequences."""
        return self.sequences * self.sequence_bytes

    @property
    def sequences(self) -> int:
        """As many as make up the least cache."""
        return -(-CACHE_BYTES_LEAST // self.sequence_bytes)


def cells() -> list[Cell]:
    """Every head size, group and context, in bfloat16."""
    shapes = itertools.product(HEAD_SIZES, GROUPS, CONTEXTS)
    return [Cell(torch.bfloat16, head_size, group, context) for head_size, group, context in shapes]


def bench_kernel_cuda(tell: Callable[[str], None]) -> Results:
    """All cells. `tell` hears which is measured. Raises ConfigError where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise ConfigError("bench kernel --device cuda: this process sees no CUDA device")
    reads: dict[str, Record] = {}
    rivals: dict[str, Record] = {}
    seconds: dict[str, Record] = {}
    launches: dict[str, Record] = {}
    for cell in cells():
        tell(f"kernel: {cell.name}")
        samples, launch = _measured(cell)
        name = max(_OWN, key=lambda kernel: statistics.median(samples[kernel]))
        own = (name, samples[name])
        probe = _fastest(_PROBES, samples)
        bandwidth = cell.read_bytes / min(samples[probe])
        inputs = {"read_bytes": cell.read_bytes, "bandwidth_bytes_per_s": bandwidth}
        reads[cell.name] = ratio((probe, samples[probe]), own, "s", at_least=_READ_LEAST)
        seconds[cell.name] = figure(own[1], "s", floor=prediction("read_floor_s", inputs))
        launches[cell.name] = figure(launch[name], "s")
        peers = [peer for peer in samples if peer.startswith("sdpa_")]
        if peers:  # otherwise none of PyTorch's serves this shape, or this device
            best = _fastest(peers, samples)
            rivals[cell.name] = ratio((best, samples[best]), own, "s", at_least=_SDPA_LEAST)
    chunks = {f"size{size}_rows{CHUNK_ROWS}": _chunk(size) for size in HEAD_SIZES}
    return {
        "kernel_cuda": {
            "read_ratio_min": extreme("least", reads, at_least=_READ_LEAST),
            "vs_sdpa_min": extreme("least", rivals, at_least=_SDPA_LEAST),
            "seconds": seconds,
            "launch_s": launches,
            "chunks": chunks,
        }
    }


def _measured(cell: Cell) -> tuple[Samples, Samples]:
    """Seconds of the device, and of the host, by kernel."""
    shape = (cell.sequences * cell.context // BLOCK_TOKENS, BLOCK_TOKENS, KV_HEADS, cell.head_size)
    key = torch.randn(shape, dtype=cell.dtype, device="cuda")
    cache = LayerCache(key, torch.randn_like(key))
    heads = KV_HEADS * cell.group
    query = torch.randn(cell.sequences, heads, cell.head_size, dtype=cell.dtype, device="cuda")
    kernels = {
        "read_sum": lambda: _read(cache),
        "read_loop": lambda: _read_loop(cache),
        "triton_adjacent": _triton(cell, query, cache, scattered=False),
        "triton_scattered": _triton(cell, query, cache, scattered=True),
        **_sdpa(cell, query, cache),
    }
    return _in_turn(kernels)


def _chunk(head_size: int) -> Results:
    """A chunk over itself: seconds, and beside PyTorch's flash attention."""
    query, key, value = (
        torch.randn(CHUNK_ROWS, heads, head_size, dtype=torch.bfloat16, device="cuda")
        for heads in (KV_HEADS * _CHUNK_GROUP, KV_HEADS, KV_HEADS)
    )
    packed, keys, values = (part.transpose(0, 1)[None].contiguous() for part in (query, key, value))
    kernel, scale = TritonKernel(), head_size**-0.5

    def flash() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(
                packed, keys, values, is_causal=True, enable_gqa=True
            )

    def own() -> None:
        kernel.causal(query, key, value, [CHUNK_ROWS], scale, None)

    samples, _ = _in_turn({"triton": own, "sdpa_flash": flash})
    return {
        "seconds": figure(samples["triton"], "s"),
        "vs_flash": ratio(("sdpa_flash", samples["sdpa_flash"]), ("triton", samples["triton"]), "s"),
    }


def _fastest(names: Iterable[str], samples: Samples) -> str:
    return min(names, key=lambda name: statistics.median(samples[name]))


def _read(cache: LayerCache) -> None:
    """A probe: all of keys and values summed as they lie, as int32, of which the device adds enough."""
    for part in (cache.key, cache.value):
        part.view(torch.int32).sum(dtype=torch.int32)


def _read_loop(cache: LayerCache) -> None:
    """The other probe: the same sums, of one stretch for each program."""
    for part in (cache.key, cache.value):
        numbers = part.view(torch.int32)
        programs = numbers.numel() // _STRETCH
        sums = torch.empty(programs, dtype=torch.int32, device=part.device)
        _sum_stretch[(programs,)](numbers, sums, STRETCH=_STRETCH, TILE=_PROBE_TILE, num_warps=8)


@triton.jit
def _sum_stretch(numbers, sums, STRETCH: tl.constexpr, TILE: tl.constexpr) -> None:
    first = tl.program_id(0).to(tl.int64) * STRETCH
    total = tl.zeros([TILE], tl.int32)
    for place in range(0, STRETCH, TILE):
        total += tl.load(numbers + first + place + tl.arange(0, TILE))
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


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
    return torch.cuda.Event(enable_timing=True)


def _in_turn(kernels: Mapping[str, Callable[[], None]]) -> tuple[Samples, Samples]:
    """Seconds of the device and of the host for each, in rounds."""
    samples: Samples = {name: [] for name in kernels}
    launches: Samples = {name: [] for name in kernels}
    for turn in range(_WARM_UP + _REPEATS):
        for name, kernel in kernels.items():
            began, ended = _event(), _event()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            began.record()
            began_s = perf_counter()
            kernel()
            launched_s = perf_counter() - began_s
            ended.record()
            ended.synchronize()
            if turn >= _WARM_UP:
                samples[name].append(began.elapsed_time(ended) / 1000)
                launches[name].append(launched_s)
    return samples, launches
