"""The C++ kernel against float64: every type, head size, grouping, block size and instruction set."""

from __future__ import annotations

import itertools
import logging
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from tests.oracle.test_kernels import HEADS, Batch, build_batch, naive
from workers.kernels import select as selecting
from workers.kernels.reference import ReferenceKernel
from workers.kernels.select import compiled_kernel, select
from workers.kernels.signature import CacheShape, LayerCache, SlotOptions, Span

if compiled_kernel() is None:
    pytest.skip("the C++ kernel is not built", allow_module_level=True)

from workers.kernels.cpu.kernel import CpuKernel, levels
from workers.kernels.cpu.layout import PackedLayout
from workers.kernels.measure import Cell, Extent, measure

OUT_BOUND = {
    # Sums of some hundred products of unit size in single precision.
    torch.float32: 1e-5,
    # Only products and sums in single precision: the types' own rounding is in the cache already.
    torch.bfloat16: 4e-3,
    torch.float16: 1e-3,
    # A number errs by up to 1/254 of its row's largest, three times the typical one: 0.7 % of a normal
    # value's size in keys and in values, some times that in the worst of some thousand rows.
    torch.int8: 6e-2,
}
"""||out - expected|| / ||expected|| of every row and head."""
LSE_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.int8: 6e-2}
SHARDS = ((1, 300), (3, 17), (2, 0), (20, 70), (1, 1), (1, 64))


@dataclass(frozen=True)
class Packed:
    """A batch, and the same cache in the packed layout, with NaN wherever no token was appended."""

    batch: Batch
    cache: LayerCache


def pack(batch: Batch, dtype: torch.dtype) -> Packed:
    """Append what the spans see, and nothing else, into a poisoned arena of two layers."""
    blocks, block_tokens, kv_heads, head_size = batch.cache.key.shape
    layout = PackedLayout()
    shape = CacheShape(2, blocks, block_tokens, kv_heads, head_size, dtype)
    cache = layout.allocate(shape, torch.device("cpu"))[1]
    if head_size % 16 == 0:  # what pads a head stays zero
        cache.key.fill_(255)
        cache.value.fill_(255)
    slots = torch.tensor(
        [
            span.blocks[slot // block_tokens] * block_tokens + slot % block_tokens
            for span in batch.spans
            for slot in range(span.visible_start, span.visible_end)
        ],
        dtype=torch.int64,
    )
    layout.append(cache, slots, batch.cache.key.flatten(0, 1)[slots], batch.cache.value.flatten(0, 1)[slots])
    return Packed(batch, cache)


def packed_batch(
    seed: int,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_tokens: int = 16,
    shards: Sequence[tuple[int, int]] = SHARDS,
) -> Packed:
    """Scattered blocks of some sequences; queries of the cache's type, float32 for int8."""
    rows = torch.float32 if dtype == torch.int8 else dtype
    batch = build_batch(
        seed, heads=heads, head_size=head_size, dtype=rows, shards=shards, block_tokens=block_tokens
    )
    return pack(batch, dtype)


def assert_within(packed: Packed, kernel: CpuKernel, dtype: torch.dtype, window: int | None = None) -> None:
    """Every row and head within its bound of float64; rows that see nothing empty."""
    batch = packed.batch
    result = kernel.attend(batch.query, batch.spans, packed.cache, batch.scale, window)
    out, lse = naive(batch, window)
    saw = ~lse.isneginf()
    assert bool((result.lse.isneginf() == ~saw).all())
    assert bool((result.out[~saw] == 0).all())
    out_error = (result.out - out).norm(dim=-1)
    assert bool((out_error <= OUT_BOUND[dtype] * out.norm(dim=-1)).all())
    lse_error = (result.lse - lse)[saw].abs()
    assert bool((lse_error <= LSE_BOUND[dtype] * lse[saw].abs().clamp(min=1)).all())


@pytest.mark.parametrize("dtype", OUT_BOUND, ids=str)
@pytest.mark.parametrize("level", levels())
def test_every_shape_is_attended_as_float64_does(level: str, dtype: torch.dtype) -> None:
    """Head sizes with and without padding, groups, block sizes with part-filled groups of sixteen."""
    kernel = CpuKernel(threads=1, level=level)
    shapes = itertools.product((8, 64, 80, 96, 128, 256), (1, 7, 16, 32, 64))
    for index, (head_size, block_tokens) in enumerate(shapes):
        heads = HEADS[index % len(HEADS)]
        assert_within(packed_batch(index, dtype, heads, head_size, block_tokens), kernel, dtype)


def test_tiles_are_left_out_where_linux_refuses_them() -> None:
    """A thread whose stack for signals has no room for tiles is offered the instruction sets without them;
    where the processor has none, it loses nothing.
    """
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0, ctypes.get_errno()
from workers.kernels.cpu.kernel import CpuKernel, levels
CpuKernel()
print(*levels())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.split() == [level for level in levels() if level != "amx"]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", OUT_BOUND, ids=str)
def test_every_group_is_attended_as_float64_does(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """MHA and any grouping; one row, many rows, and rows that see nothing."""
    for head_size in (64, 128):
        assert_within(packed_batch(3, dtype, heads, head_size), CpuKernel(threads=1), dtype)


@pytest.mark.parametrize("window", [1, 5, 33, 500])
@pytest.mark.parametrize("level", levels())
def test_windows_cut_each_row_by_its_own_position(level: str, window: int) -> None:
    """To nothing where the window ends before the shard."""
    kernel = CpuKernel(threads=2, level=level)
    for dtype, block_tokens in itertools.product((torch.float32, torch.bfloat16), (7, 32)):
        packed = packed_batch(4, dtype, (6, 2), block_tokens=block_tokens)
        assert_within(packed, kernel, dtype, window)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", OUT_BOUND, ids=str)
def test_the_same_plan_and_threads_give_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    """Run to run, from one kernel or another, and from several threads of Python at once."""
    packed = packed_batch(5, dtype, (9, 3), shards=((1, 900), (70, 100), (1, 3)))
    batch = packed.batch
    kernel = CpuKernel(threads=threads)
    assert_within(packed, kernel, dtype)
    expected = kernel.attend(batch.query, batch.spans, packed.cache, batch.scale)

    def differs(index: int) -> bool:
        chosen = kernel if index % 2 else CpuKernel(threads=threads)
        result = chosen.attend(batch.query, batch.spans, packed.cache, batch.scale)
        return not (torch.equal(result.out, expected.out) and torch.equal(result.lse, expected.lse))

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(differs, range(24)))


def test_options_are_attended_as_the_specification_says() -> None:
    """Biases, positions and masses, which PyTorch computes over copies of the blocks."""
    packed = packed_batch(6, torch.float32, shards=((2, 30), (1, 9)), block_tokens=4)
    batch = packed.batch
    options = [
        SlotOptions(
            bias=torch.rand(len(span.blocks) * 4),
            positions=torch.arange(len(span.blocks) * 4) + span.first_position,
            mass_lse=torch.ones(span.row_count, 4),
        )
        for span in batch.spans
    ]
    result = CpuKernel(threads=1).attend(batch.query, batch.spans, packed.cache, batch.scale, 20, options)
    expected = ReferenceKernel().attend(batch.query, batch.spans, batch.cache, batch.scale, 20, options)
    torch.testing.assert_close(result.out, expected.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.lse, expected.lse, atol=1e-5, rtol=1e-5)
    for mass, wanted in zip(result.mass, expected.mass, strict=True):
        torch.testing.assert_close(mass, wanted, atol=1e-5, rtol=1e-4)


def test_scores_that_overflow_half_precision_stay_exact() -> None:
    """Scores of 10^5 neither overflow nor lose the one slot that wins."""
    key = torch.full((1, 2, 1, 16), 80.0)
    key[0, 1] = -80.0
    value = torch.randn(1, 2, 1, 16)
    batch = Batch(torch.full((1, 1, 16), 80.0), [Span(0, 1, 2, (0,), 0, 0, 2)], LayerCache(key, value), 1.0)
    packed = pack(batch, torch.float32)
    for level in levels():
        result = CpuKernel(threads=1, level=level).attend(batch.query, batch.spans, packed.cache, 1.0)
        torch.testing.assert_close(result.out[0], value[0, 0])
        assert result.lse.item() == pytest.approx(16 * 80.0**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", levels())
def test_a_score_below_all_numbers_has_no_weight(level: str, dtype: torch.dtype) -> None:
    """In chunks that rows see whole, and in those they do not."""
    batch = packed_batch(9, dtype, (6, 2), shards=((24, 300), (1, 70))).batch
    batch.query[:, :, 0] = 1e30
    for span in batch.spans:
        batch.cache.key[list(span.blocks), :, :, 0] = 0
        for slot in range(5, span.visible_end, 7):
            batch.cache.key[span.blocks[slot // 16], slot % 16, :, 0] = -1e30
    assert_within(pack(batch, dtype), CpuKernel(threads=1, level=level), dtype)


@pytest.mark.parametrize("climb", [2.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", levels())
def test_scores_may_climb_slowly_or_fast(level: str, dtype: torch.dtype, climb: float) -> None:
    """From chunk to chunk, so that what weights are measured by lags behind them, or changes each time."""
    batch = packed_batch(8, dtype, (6, 2), shards=((24, 300), (1, 300))).batch
    for span in batch.spans:
        for slot in range(span.visible_end):
            batch.cache.key[span.blocks[slot // 16], slot % 16, :, 0] = climb * (slot // 64) / 8
    batch.query[:, :, 0] = 8 / batch.scale
    assert_within(pack(batch, dtype), CpuKernel(threads=2, level=level), dtype)


def _refused_batches() -> dict[str, Packed]:
    good = packed_batch(7, torch.float32, shards=((2, 20), (1, 8)))
    query, spans = good.batch.query, good.batch.spans
    first, second = spans

    def with_span(**change: int) -> Packed:
        fields = {name: getattr(first, name) for name in Span.__slots__}
        return Packed(replace(good.batch, spans=[Span(**(fields | change)), second]), good.cache)

    def with_blocks(*blocks: int) -> Packed:
        return Packed(replace(good.batch, spans=[Span(0, 1, 99, blocks, 0, 0, 9)]), good.cache)

    return {
        "other head size": Packed(replace(good.batch, query=query[..., :32]), good.cache),
        "other dtype": Packed(replace(good.batch, query=query.half()), good.cache),
        "heads do not divide": Packed(replace(good.batch, query=query[:, :3]), good.cache),
        "no heads": Packed(replace(good.batch, query=query[:, :0]), good.cache),
        "another layout": Packed(good.batch, good.batch.cache),
        "rows overlap": with_span(row_start=2),
        "no rows": with_span(row_count=0),
        "rows beyond the batch": Packed(replace(good.batch, query=query[:2]), good.cache),
        "rows before the batch": with_span(row_start=-1),
        "slots beyond the blocks": with_span(visible_end=10_000, query_position=20_000),
        "range backwards": with_span(visible_start=20, visible_end=10),
        "slots before the first": with_span(visible_start=-1),
        "slots after the row": with_span(query_position=first.query_position - 1),
        "foreign block": with_blocks(0, 99),
        "negative block": with_blocks(0, -1),
        "no block": with_blocks(),
    }


@pytest.mark.parametrize("case", list(_refused_batches()))
def test_what_does_not_fit_is_refused(case: str) -> None:
    """A wrong shape or range raises ValueError before any memory is read."""
    packed = _refused_batches()[case]
    with pytest.raises(ValueError, match=r"\d"):
        CpuKernel(threads=1).attend(packed.batch.query, packed.batch.spans, packed.cache, packed.batch.scale)


def test_rows_and_arguments_that_do_not_fit_are_refused() -> None:
    """Slots outside the arena, rows of another shape, unknown types and instruction sets."""
    layout, kernel = PackedLayout(), CpuKernel()
    shape = CacheShape(1, 2, 16, 2, 64, torch.float32)
    cache = layout.allocate(shape, torch.device("cpu"))[0]
    rows = torch.zeros(1, 2, 64)
    for slot in (-1, 32):
        with pytest.raises(ValueError, match=f"slot {slot} of 32"):
            layout.append(cache, torch.tensor([slot]), rows, rows)
        with pytest.raises(ValueError, match=f"slot {slot} of 32"):
            layout.read(cache, torch.tensor([slot]))
    with pytest.raises(ValueError, match="rows"):
        layout.append(cache, torch.tensor([0]), rows, rows[..., :63])
    with pytest.raises(ValueError, match="rows"):
        layout.append(cache, torch.tensor([0, 1]), rows, rows)
    for slots in (
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([[0]]),
        torch.tensor([0], device="meta"),
    ):
        with pytest.raises(ValueError, match="slots"):
            layout.append(cache, slots, rows, rows)
    with pytest.raises(ValueError, match="4 types"):
        layout.allocate(replace(shape, dtype=torch.float64), torch.device("cpu"))
    with pytest.raises(ValueError, match="instruction set"):
        CpuKernel(level="sse9")
    with pytest.raises(ValueError, match="window"):
        kernel.attend(torch.zeros(1, 2, 64), [], cache, 1.0, window=0)


def test_spans_are_packed_once_and_never_confused() -> None:
    """Spans remembered from one call are not taken for others, whatever was freed in between."""
    packed = packed_batch(8, torch.float32, shards=((1, 40), (1, 40)))
    batch, kernel = packed.batch, CpuKernel(threads=1)
    for index in range(100):
        spans: Sequence[Span] = [
            replace(span, blocks=tuple(span.blocks), visible_end=10 + index % 30) for span in batch.spans
        ]
        if index % 2:
            spans = tuple(spans)
        result = kernel.attend(batch.query, spans, packed.cache, batch.scale)
        again = kernel.attend(batch.query, spans, packed.cache, batch.scale)
        expected = naive(replace(batch, spans=list(spans)), None)[1]
        torch.testing.assert_close(result.lse.double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(result.lse, again.lse)


def test_without_the_extension_pytorch_serves_and_one_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """auto falls back; asking for the kernel by name is an error."""
    monkeypatch.setitem(sys.modules, "workers.kernels.cpu._native", None)
    selecting.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="anabranch.kernels"):
        assert [select("auto", "cpu").name for _ in range(3)] == ["torch"] * 3
    assert len(caplog.records) == 1
    assert "compiler" in caplog.text
    with pytest.raises(ValueError, match="not built"):
        select("cpu", "cpu")


def test_auto_is_the_compiled_kernel() -> None:
    """Where it is built, it serves."""
    assert select("auto", "cpu").name == select("cpu", "cpu").name == "cpu"


def test_a_measurement_carries_what_its_ratios_come_from() -> None:
    """Every cell has its samples, its error within the bound of its type, and ratios made of them."""
    chosen = [Cell("bfloat16", 64, 3, 1, 1), Cell("int8", 64, 1, 1, 2), Cell("float32", 64, 1, 8, 1)]
    results = measure(Extent(tokens=256, cache_bytes=2**20, repeats=3), chosen)
    for cell in chosen:
        figures = results["cells"][cell.name]
        best = map(max, zip(*figures["probe_gb_s"].values(), strict=True))
        ratios = [read / probe for read, probe in zip(figures["read_gb_s"], best, strict=True)]
        assert figures["read_ratio"] == statistics.median(ratios)
        assert len(ratios) == 3
        assert 0 < figures["error"] < OUT_BOUND[getattr(torch, cell.dtype)]
