"""The Triton kernels against float64 and the specification: in Triton's interpreter on any machine, and with
`-m gpu` on the device.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.test_kernels import OUT_TOLERANCE, Batch, assert_close, build_batch, naive, naive_causal
from workers.kernels.reference import ReferenceKernel
from workers.kernels.signature import AttendResult, Kernel, LayerCache, SlotOptions, Span
from workers.kernels.torch_flash import TorchKernel
from workers.kernels.triton.append import append
from workers.kernels.triton.arithmetic import exponential
from workers.kernels.triton.kernel import TritonKernel
from workers.partials import Partial, merge

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
EVERY_DTYPE = tuple(OUT_TOLERANCE)
HEAD_SIZES = (64, 80, 96, 128, 256)
HEADS = ((2, 2), (3, 1), (4, 2), (8, 1), (20, 1))
"""(query heads, KV heads): groups of 1, 3, 2, 8, and 20, which fills more than a tile."""
BLOCK_TOKENS = (1, 7, 16, 32)
SHAPES = tuple(
    (dtype, head_size, HEADS[index % 5], BLOCK_TOKENS[index % 4])
    for index, (dtype, head_size) in enumerate(itertools.product(EVERY_DTYPE, HEAD_SIZES))
)
"""Every dtype with every head size; groups and block sizes take turns."""


def attend_on(device: str, kernel: Kernel, batch: Batch, window: int | None = None) -> AttendResult:
    """Attend a batch that was built on the CPU on `device`; the result is back on the CPU."""
    cache = LayerCache(batch.cache.key.to(device), batch.cache.value.to(device))
    result = kernel.attend(batch.query.to(device), batch.spans, cache, batch.scale, window)
    return AttendResult(result.out.cpu(), result.lse.cpu(), result.mass)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "head_size", "heads", "block_tokens"), SHAPES, ids=str)
def test_attends_like_the_textbook(
    device: str, dtype: torch.dtype, head_size: int, heads: tuple[int, int], block_tokens: int
) -> None:
    """Every dtype and head size over scattered blocks: decoding rows, a chunk, a shard that shows nothing."""
    batch = build_batch(
        3,
        heads=heads,
        head_size=head_size,
        dtype=dtype,
        shards=((1, 330), (1, 0), (2, 40)),
        block_tokens=block_tokens,
    )
    assert_close(attend_on(device, TritonKernel(), batch), *naive(batch, None), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("window", [1, 5, 33, 500])
def test_windows_cut_each_row_by_its_own_position(device: str, window: int, dtype: torch.dtype) -> None:
    """Whole splits fall out of a window, rows of one tile see different slots, some see none."""
    batch = build_batch(4, heads=(4, 2), dtype=dtype, shards=((1, 300), (9, 40), (3, 2), (1, 0)))
    assert_close(attend_on(device, TritonKernel(16), batch, window), *naive(batch, window), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "head_size", "heads", "block_tokens"), SHAPES[::2], ids=str)
def test_chunks_see_themselves_up_to_each_row(
    device: str, dtype: torch.dtype, head_size: int, heads: tuple[int, int], block_tokens: int
) -> None:
    """Chunks of any length, the values strided as a fused projection leaves them, the keys not."""
    torch.manual_seed(5)
    chunks = (1, 4, 1)
    window = None if block_tokens == 16 else 3
    query = torch.randn(sum(chunks), heads[0], head_size).to(dtype)
    fused = torch.randn(sum(chunks), 2 * heads[1], head_size).to(dtype).to(device)
    key, value = fused.chunk(2, dim=1)
    result = TritonKernel(16).causal(query.to(device), key.contiguous(), value, chunks, 0.125, window)
    expected = naive_causal(query, key.cpu(), value.cpu(), chunks, 0.125, window)
    assert_close(AttendResult(result.out.cpu(), result.lse.cpu(), ()), *expected, dtype)


def _equals_reference(device: str, batch: Batch, window: int | None, split_slots_least: int) -> None:
    expected = ReferenceKernel().attend(batch.query, batch.spans, batch.cache, batch.scale, window)
    result = attend_on(device, TritonKernel(split_slots_least), batch, window)
    assert_close(result, expected.out, expected.lse, torch.float32)


BATCHES = given(
    seed=st.integers(0, 2**20),
    heads=st.sampled_from(HEADS),
    shards=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 70)), min_size=1, max_size=2),
    block_tokens=st.sampled_from(BLOCK_TOKENS),
    window=st.one_of(st.none(), st.integers(1, 80)),
    split_slots_least=st.sampled_from([16, 48, 256]),
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None)
@BATCHES
def test_any_batch_equals_the_specification(
    device: str,
    seed: int,
    heads: tuple[int, int],
    shards: list[tuple[int, int]],
    block_tokens: int,
    window: int | None,
    split_slots_least: int,
) -> None:
    """Any spans, blocks, window and splits give what the reference gives."""
    batch = build_batch(seed, heads=heads, head_size=16, shards=shards, block_tokens=block_tokens)
    _equals_reference(device, batch, window, split_slots_least)


@pytest.mark.parametrize("device", DEVICES)
def test_parts_of_a_shard_merge_to_the_whole(device: str) -> None:
    """Two halves of the slots, each attended alone, sum to what one call over all of them gives."""
    batch = build_batch(6, shards=((2, 500),), block_tokens=16)
    (span,) = batch.spans
    halves = [
        Span(0, 2, span.query_position, span.blocks, span.first_position, *ends)
        for ends in ((span.visible_start, 201), (201, 500))
    ]
    parts = [
        attend_on(device, TritonKernel(), Batch(batch.query, [half], batch.cache, batch.scale))
        for half in halves
    ]
    whole = attend_on(device, TritonKernel(16), batch)
    merged = merge([Partial(part.out, part.lse) for part in parts])
    assert_close(AttendResult(merged.out, merged.lse, ()), whole.out, whole.lse, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_batch_gives_the_same_bits(device: str) -> None:
    """Remembered tables or new ones, another kernel object: the sums run in the same order."""
    batch = build_batch(7, dtype=torch.bfloat16, shards=((1, 600), (5, 40)))
    kernel = TritonKernel(32)
    results = [attend_on(device, each, batch) for each in (kernel, kernel, TritonKernel(32))]
    for other in results[1:]:
        assert torch.equal(other.out, results[0].out)
        assert torch.equal(other.lse, results[0].lse)


@pytest.mark.parametrize("device", DEVICES)
def test_remembered_tables_never_serve_other_blocks(device: str) -> None:
    """A table that grew or changed, in place or as another tuple, is read as it is now."""
    batch = build_batch(8, shards=((1, 24),), block_tokens=8)
    (span,) = batch.spans
    kernel = TritonKernel()
    blocks: list[int] = []
    for order in itertools.permutations(span.blocks[:3]):
        blocks[:] = order
        for table in (blocks, order):
            changed = Span(0, 1, span.query_position, table, span.first_position, 0, 24)
            now = Batch(batch.query, [changed], batch.cache, batch.scale)
            assert_close(attend_on(device, kernel, now), *naive(now, None), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    """A block the cache lacks is refused, also where a larger cache was attended with the same table."""
    batch = build_batch(9, shards=((1, 24),))
    kernel = TritonKernel()
    attend_on(device, kernel, batch)
    (span,) = batch.spans
    fewer = max(span.blocks[:3])
    cache = LayerCache(batch.cache.key[:fewer], batch.cache.value[:fewer])
    with pytest.raises(ValueError, match="blocks"):
        attend_on(device, kernel, Batch(batch.query, batch.spans, cache, batch.scale))
    with pytest.raises(ValueError, match="window"):
        attend_on(device, kernel, batch, 0)
    rows = torch.zeros(4, 2, 16, device=device)
    with pytest.raises(ValueError, match="chunks"):
        kernel.causal(rows, rows, rows, [3], 1.0, None)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_attend_is_no_launch(device: str) -> None:
    """No rows and no spans give empty results."""
    batch = build_batch(10, shards=((2, 9),))
    no_spans = attend_on(device, TritonKernel(), Batch(batch.query, [], batch.cache, batch.scale))
    assert bool((no_spans.out == 0).all())
    assert bool(no_spans.lse.isneginf().all())
    no_rows = attend_on(device, TritonKernel(), Batch(batch.query[:0], [], batch.cache, batch.scale))
    assert no_rows.out.shape == (0, 4, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_options_are_served_as_by_the_pytorch_backend(device: str) -> None:
    """Bias and mass give what the PyTorch path gives."""
    batch = build_batch(11, shards=((2, 9),))
    cache = LayerCache(batch.cache.key.to(device), batch.cache.value.to(device))
    slots = len(batch.spans[0].blocks) * 8
    options = [SlotOptions(torch.rand(slots, device=device), None, torch.zeros(2, 4, device=device))]
    backends: Sequence[Kernel] = (TritonKernel(), TorchKernel())
    results = [
        kernel.attend(batch.query.to(device), batch.spans, cache, batch.scale, None, options)
        for kernel in backends
    ]
    torch.testing.assert_close(results[0].out, results[1].out)
    torch.testing.assert_close(results[0].mass, results[1].mass)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_appended_rows_lie_in_their_slots(device: str, dtype: torch.dtype) -> None:
    """Rows, strided ones too, arrive in their slots, and nowhere else; float32 is converted."""
    torch.manual_seed(12)
    shape = (5, 7, 3, 80)
    cache = LayerCache(torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype))
    key, value = torch.randn(6, 6, 80).to(device, dtype).chunk(2, dim=1)
    slots = torch.tensor([34, 0, 7, 6, 20, 13], device=device)
    wanted = [part.clone() for part in (cache.key, cache.value)]
    for part, rows in zip(wanted, (key, value), strict=True):
        part.flatten(0, 1).index_copy_(0, slots, rows.to(dtype))
    append(cache, slots, key.float(), value.float())
    assert torch.equal(cache.key, wanted[0])
    append(cache, slots, key, value)
    assert torch.equal(cache.key, wanted[0])
    assert torch.equal(cache.value, wanted[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_outside_the_cache_is_not_written(device: str) -> None:
    """Neither below nor above; rows of another shape are refused."""
    whole = torch.zeros(6, 4, 1, 16, device=device)
    cache = LayerCache(whole[1:5], whole[1:5].clone())
    rows = torch.ones(2, 1, 16, device=device)
    append(cache, torch.tensor([-1, 16], device=device), rows, rows)
    assert bool((whole == 0).all())
    with pytest.raises(ValueError, match="slots"):
        append(cache, torch.tensor([1, 2, 3], device=device), rows, rows)


@triton.jit  # type: ignore[untyped-decorator]
def _exponentials(scores, results, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(results + place, exponential(tl.load(scores + place), PRECISE=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_exponential_is_right_to_the_last_bits(device: str) -> None:
    """Within two units in the last place of float64's, from 0 to -86, and close to nothing below."""
    scores = torch.cat((torch.linspace(-86, 0, 4095), torch.tensor([-torch.inf])))
    results = torch.empty(4096, device=device)
    _exponentials[(4,)](scores.to(device), results, COUNT=1024)
    expected = torch.exp(scores.double())
    off: Tensor = (results.cpu().double() - expected).abs() / torch.clamp(expected, min=1e-30)
    assert float(off[:-1].max()) < 2 * 2**-23
    assert float(results[-1]) < 1e-37


@pytest.mark.gpu
def test_the_device_runs_compiled_kernels() -> None:
    """An interpreter, which also takes a device's tensors, would prove nothing here."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    assert isinstance(_exponentials, triton.JITFunction)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("window", [None, 4096])
def test_long_contexts_equal_plain_matrix_products(dtype: torch.dtype, window: int | None) -> None:
    """32k and 5k tokens, decoding and chunks, many splits, on the device."""
    batch = build_batch(
        13,
        heads=(8, 2),
        head_size=128,
        dtype=dtype,
        shards=((1, 32_768), (1, 5000), (64, 5000)),
        block_tokens=32,
    )
    expected = attend_on("cuda", TorchKernel(), batch, window)
    result = attend_on("cuda", TritonKernel(), batch, window)
    assert_close(result, expected.out, expected.lse, dtype)
