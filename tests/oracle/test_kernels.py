"""Two rungs of the oracle: `reference` against naive float64 attention, each backend against `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kernels.reference import ReferenceKernel
from workers.kernels.select import select
from workers.kernels.signature import AttendResult, Kernel, LayerCache, SlotOptions, Span

torch.set_num_threads(1)

OUT_TOLERANCE = {
    # Sums of some hundred products of unit size in single precision: a few times 2^-24 each.
    torch.float32: 5e-6,
    # Softmax weights and the output are rounded to 8 bits: 2^-9 of values up to about 4.
    torch.bfloat16: 2e-2,
    # The same with 11 bits.
    torch.float16: 3e-3,
}
LSE_TOLERANCE = {
    torch.float32: 5e-6,
    # Scores are summed in single precision from exactly representable products, whatever the cache's type.
    torch.bfloat16: 1e-4,
    torch.float16: 1e-4,
}
BACKENDS = ("torch",)
HEADS = ((4, 4), (3, 1), (9, 3), (8, 2), (16, 2))
"""(query heads, KV heads): MHA and groups of 3, 3, 4 and 8."""


@dataclass(frozen=True)
class Batch:
    """Arguments of `Kernel.attend`."""

    query: Tensor
    spans: list[Span]
    cache: LayerCache
    scale: float


def build_batch(
    seed: int,
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
    shards: Sequence[tuple[int, int]] = ((1, 40),),
    block_tokens: int = 8,
    fragmented: bool = True,
) -> Batch:
    """A batch of spans, one per (rows, visible slots) of `shards`, over scattered or adjacent blocks."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-slots // block_tokens) + 1 for _, slots in shards]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=generator).tolist() if fragmented else list(range(blocks))
    shape = (blocks, block_tokens, heads[1], head_size)
    key = torch.randn(shape, generator=generator).to(dtype)
    value = torch.randn(shape, generator=generator).to(dtype)
    spans: list[Span] = []
    row = 0
    for (rows, slots), count in zip(shards, needed, strict=True):
        first = int(torch.randint(0, 50, (), generator=generator))
        hidden = min(int(torch.randint(0, 4, (), generator=generator)), slots)
        spans.append(Span(row, rows, first + slots, order[:count], first, hidden, slots))
        order = order[count:]
        row += rows
    query = torch.randn(row + 1, heads[0], head_size, generator=generator).to(dtype)
    return Batch(query, spans, LayerCache(key, value), head_size**-0.5)


def naive(batch: Batch, window: int | None) -> tuple[Tensor, Tensor]:
    """Attention by the textbook in float64, the whole batch as one masked matrix of all slots."""
    heads, kv_heads = batch.query.shape[1], batch.cache.key.shape[2]
    key = batch.cache.key.flatten(0, 1).double().repeat_interleave(heads // kv_heads, 1)
    value = batch.cache.value.flatten(0, 1).double().repeat_interleave(heads // kv_heads, 1)
    mask = torch.zeros(batch.query.shape[0], key.shape[0], dtype=torch.bool)
    block_tokens = batch.cache.key.shape[1]
    for span in batch.spans:
        for slot in range(span.visible_start, span.visible_end):
            for row in range(span.row_count):
                age = span.query_position + row - (span.first_position + slot)
                flat = span.blocks[slot // block_tokens] * block_tokens + slot % block_tokens
                mask[span.row_start + row, flat] = window is None or age < window
    scores = torch.einsum("rhd,shd->hrs", batch.query.double(), key) * batch.scale
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("hrs,shd->rhd", scores.softmax(-1).nan_to_num(0.0), value)
    return out, scores.logsumexp(-1).T


def naive_causal(
    query: Tensor, key: Tensor, value: Tensor, chunks: Sequence[int], scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Chunks over themselves by the textbook in float64."""
    group = query.shape[1] // key.shape[1]
    member = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(chunks))
    age = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
    mask = (member[:, None] == member[None]) & (age >= 0) & (age < (window or len(query)))
    scores = torch.einsum("rhd,shd->hrs", query.double(), key.double().repeat_interleave(group, 1)) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("hrs,shd->rhd", scores.softmax(-1), value.double().repeat_interleave(group, 1))
    return out, scores.logsumexp(-1).T


def assert_close(result: AttendResult, out: Tensor, lse: Tensor, dtype: torch.dtype) -> None:
    """Within the table of tolerances, types and empty rows included."""
    assert result.out.dtype == result.lse.dtype == torch.float32
    assert bool((result.lse.isneginf() == lse.isneginf()).all())
    assert bool((result.out[result.lse.isneginf()] == 0).all())
    torch.testing.assert_close(result.out.double(), out.double(), atol=OUT_TOLERANCE[dtype], rtol=1e-6)
    torch.testing.assert_close(result.lse.double(), lse.double(), atol=LSE_TOLERANCE[dtype], rtol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_reference_is_textbook_attention(heads: tuple[int, int], window: int | None) -> None:
    """The specification equals masked float64 attention, windows and groups included."""
    batch = build_batch(1, heads=heads, head_size=16, shards=((1, 13), (3, 1), (2, 0), (5, 9)))
    result = ReferenceKernel().attend(batch.query, batch.spans, batch.cache, batch.scale, window)
    assert_close(result, *naive(batch, window), torch.float32)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_reference_causal_is_textbook_attention(window: int | None) -> None:
    """Chunks see themselves, and nothing of each other."""
    torch.manual_seed(2)
    query, key, value = torch.randn(10, 6, 16), torch.randn(10, 2, 16), torch.randn(10, 2, 16)
    result = ReferenceKernel().causal(query, key, value, [1, 6, 3], 0.3, window)
    assert_close(result, *naive_causal(query, key, value, [1, 6, 3], 0.3, window), torch.float32)


@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_attends_like_the_textbook(
    backend: str, heads: tuple[int, int], head_size: int, dtype: torch.dtype
) -> None:
    """Every head size and grouping, unequal shards, rows that see nothing, fragmented and adjacent blocks."""
    shards = ((1, 300), (1, 1), (4, 63), (2, 0), (64, 17))
    for fragmented in (True, False):
        batch = build_batch(
            3, heads=heads, head_size=head_size, dtype=dtype, shards=shards, fragmented=fragmented
        )
        result = select(backend, "cpu").attend(batch.query, batch.spans, batch.cache, batch.scale)
        assert_close(result, *naive(batch, None), dtype)


@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [1, 5, 33, 500])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_windows_like_the_textbook(backend: str, window: int, dtype: torch.dtype) -> None:
    """A window cuts each row by its own position, to nothing where it ends before the shard."""
    batch = build_batch(4, heads=(6, 2), dtype=dtype, shards=((1, 300), (7, 40), (40, 3), (1, 0)))
    result = select(backend, "cpu").attend(batch.query, batch.spans, batch.cache, batch.scale, window)
    assert_close(result, *naive(batch, window), dtype)


@pytest.mark.parametrize("dtype", OUT_TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunks", [(1, 1, 1), (64,), (1, 17, 1, 5)])
@pytest.mark.parametrize("window", [None, 4, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_causal_like_the_textbook(
    backend: str, heads: tuple[int, int], chunks: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    """Chunks of any length over themselves, keys and values strided as a fused projection leaves them."""
    torch.manual_seed(5)
    rows = sum(chunks)
    query = torch.randn(rows, heads[0], 64).to(dtype)
    fused = torch.randn(rows, 2 * heads[1], 64).to(dtype)
    key, value = fused.chunk(2, dim=1)
    result = select(backend, "cpu").causal(query, key, value, chunks, 0.125, window)
    assert_close(result, *naive_causal(query, key, value, chunks, 0.125, window), dtype)


def test_long_runs_are_merged_where_they_lie() -> None:
    """Runs long enough not to be copied together are summed by the algebra of partials."""
    batch = build_batch(6, shards=((2, 2000),), block_tokens=512, fragmented=True)
    blocks = [4, 0, 3, 1, 2]
    span = Span(0, 2, 2000, blocks, 0, 3, 1999)
    batch = Batch(batch.query, [span], batch.cache, batch.scale)
    result = select("torch", "cpu").attend(batch.query, batch.spans, batch.cache, batch.scale)
    assert_close(result, *naive(batch, None), torch.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    heads=st.sampled_from(HEADS),
    shards=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 30)), min_size=1, max_size=4),
    block_tokens=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 40)),
    asks=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_backend_equals_reference(
    seed: int,
    heads: tuple[int, int],
    shards: list[tuple[int, int]],
    block_tokens: int,
    window: int | None,
    asks: tuple[bool, bool, bool],
) -> None:
    """Any batch, with any of bias, positions and mass, is attended as the specification says."""
    batch = build_batch(seed, heads=heads, head_size=16, shards=shards, block_tokens=block_tokens)
    options = (
        [_options(seed, span, block_tokens, heads[0], asks) for span in batch.spans] if any(asks) else None
    )
    kernels: list[Kernel] = [ReferenceKernel(), select("torch", "cpu")]
    expected, result = (
        kernel.attend(batch.query, batch.spans, batch.cache, batch.scale, window, options)
        for kernel in kernels
    )
    assert_close(result, expected.out, expected.lse, torch.float32)
    for wanted, mass in zip(expected.mass, result.mass, strict=True):
        assert (wanted is None) == (mass is None)
        if wanted is not None and mass is not None:
            torch.testing.assert_close(mass, wanted, atol=1e-4, rtol=1e-4)


def _options(
    seed: int, span: Span, block_tokens: int, query_heads: int, asks: tuple[bool, bool, bool]
) -> SlotOptions:
    generator = torch.Generator().manual_seed(seed)
    slots = len(span.blocks) * block_tokens
    return SlotOptions(
        torch.rand(slots, generator=generator) if asks[0] else None,
        span.first_position + torch.randint(0, slots + 1, (slots,), generator=generator) if asks[1] else None,
        torch.rand(span.row_count, query_heads, generator=generator) + 1 if asks[2] else None,
    )


def _refused_batches() -> dict[str, Batch]:
    good = build_batch(7, shards=((2, 20), (1, 8)))
    query, spans, cache, scale = good.query, good.spans, good.cache, good.scale
    first, second = spans

    def with_span(**change: int) -> Batch:
        fields = {name: getattr(first, name) for name in Span.__slots__}
        return Batch(query, [Span(**(fields | change)), second], cache, scale)

    return {
        "other head size": Batch(query[..., :32], spans, cache, scale),
        "other dtype": Batch(query.half(), spans, cache, scale),
        "heads do not divide": Batch(query[:, :3], spans, cache, scale),
        "value differs": Batch(query, spans, LayerCache(cache.key, cache.value[:-1]), scale),
        "cache not adjacent": Batch(query, spans, LayerCache(cache.key[::2], cache.value[::2]), scale),
        "rows overlap": with_span(row_start=2),
        "no rows": with_span(row_count=0),
        "rows beyond the batch": Batch(query[:2], spans, cache, scale),
        "slots beyond the blocks": with_span(visible_end=10_000),
        "range backwards": with_span(visible_start=20, visible_end=10),
        "slots after the row": with_span(query_position=first.query_position - 1),
        "foreign block": Batch(query, [Span(0, 1, 99, [0, 99], 0, 0, 9)], cache, scale),
        "negative block": Batch(query, [Span(0, 1, 99, [0, -1], 0, 0, 9)], cache, scale),
    }


@pytest.mark.parametrize("kernel", [ReferenceKernel(), select("torch", "cpu")], ids=lambda k: k.name)
@pytest.mark.parametrize("case", list(_refused_batches()))
def test_what_does_not_fit_is_refused(case: str, kernel: Kernel) -> None:
    """A wrong shape or range raises ValueError before any memory is read."""
    batch = _refused_batches()[case]
    with pytest.raises(ValueError, match=r"\d"):
        kernel.attend(batch.query, batch.spans, batch.cache, batch.scale)


@pytest.mark.parametrize("kernel", [ReferenceKernel(), select("torch", "cpu")], ids=lambda k: k.name)
def test_options_and_chunks_that_do_not_fit_are_refused(kernel: Kernel) -> None:
    """A bias of the wrong length, options for too few spans, a window of nothing, chunks that miss rows."""
    batch = build_batch(8)
    arguments = (batch.query, batch.spans, batch.cache, batch.scale)
    with pytest.raises(ValueError, match="bias"):
        kernel.attend(*arguments, options=[SlotOptions(bias=torch.zeros(3))])
    with pytest.raises(ValueError, match="mass_lse"):
        kernel.attend(*arguments, options=[SlotOptions(mass_lse=torch.zeros(3, 4))])
    with pytest.raises(ValueError, match="0 options"):
        kernel.attend(*arguments, options=[])
    with pytest.raises(ValueError, match="window"):
        kernel.attend(*arguments, window=0)
    rows = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="chunks"):
        kernel.causal(rows, rows, rows, [3], 1.0, None)
    with pytest.raises(ValueError, match="queries"):
        kernel.causal(rows, rows[:3], rows[:3], [4], 1.0, None)


def test_scores_that_overflow_half_precision_stay_exact() -> None:
    """Scores of 10^5 neither overflow nor lose the one slot that wins."""
    cache = LayerCache(torch.full((1, 2, 1, 16), 80.0), torch.randn(1, 2, 1, 16))
    cache.key[0, 1] = -80.0
    result = select("torch", "cpu").attend(
        torch.full((1, 1, 16), 80.0), [Span(0, 1, 2, [0], 0, 0, 2)], cache, 1.0
    )
    torch.testing.assert_close(result.out[0], cache.value[0, 0])
    assert result.lse.item() == pytest.approx(16 * 80.0**2)


def test_select_names_what_there_is() -> None:
    """auto is triton on a GPU; an unknown name or device is refused with the choices."""
    assert select("auto", "cuda").name == "triton"
    assert select("torch", "cuda").name == "torch"
    assert select("reference", "cpu").name == "reference"
    with pytest.raises(ValueError, match="there are auto"):
        select("flash", "cpu")
    with pytest.raises(ValueError, match="tpu"):
        select("auto", "tpu")
