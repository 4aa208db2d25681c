"""What every backend refuses, in one place: shapes, types and ranges that do not fit each other.

A kernel reads memory by the numbers it is given; a wrong one would read another sequence's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from workers.kernels.signature import LayerCache, SlotOptions, Span


def check_attend(
    query: Tensor,
    spans: Sequence[Span],
    cache: LayerCache,
    window: int | None,
    options: Sequence[SlotOptions] | None,
) -> None:
    """Raise ValueError unless `Kernel.attend` may run on these arguments."""
    _check_cache(cache)
    _check_heads(query, cache.key)
    _check_window(window)
    block_tokens = cache.key.shape[1]
    check_spans(spans, query.shape[0], cache.key.shape[0], block_tokens)
    if options is None:
        for span in spans:
            _check_past(span)
        return
    if len(options) != len(spans):
        raise ValueError(f"{len(options)} options for {len(spans)} spans")
    for span, option in zip(spans, options, strict=True):
        _check_options(option, span, len(span.blocks) * block_tokens, query.shape[1])


def check_spans(spans: Sequence[Span], rows: int, blocks: int, block_tokens: int) -> None:
    """Raise ValueError unless all lies within `rows` query rows and a cache of `blocks` blocks."""
    rows_taken = 0
    for span in sorted(spans, key=_row_start):
        if span.row_start < rows_taken or span.row_count < 1:
            raise ValueError(f"{span}: rows overlap another span's, or are none")
        rows_taken = span.row_start + span.row_count
        _check_range(span, blocks, block_tokens)
    if rows_taken > rows:
        raise ValueError(f"spans name {rows_taken} rows of {rows}")


def check_causal(
    query: Tensor, key: Tensor, value: Tensor, chunks: Sequence[int], window: int | None
) -> None:
    """Raise ValueError unless `Kernel.causal` may run on these arguments."""
    if key.ndim != 3 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(f"key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)} {value.dtype}")
    _check_heads(query, key)
    _check_window(window)
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"{query.shape[0]} queries for {key.shape[0]} keys")
    if sum(chunks) != query.shape[0] or any(count < 1 for count in chunks):
        raise ValueError(f"chunks {list(chunks)} do not add up to {query.shape[0]} rows")


def _row_start(span: Span) -> int:
    return span.row_start


def _check_cache(cache: LayerCache) -> None:
    key, value = cache.key, cache.value
    if key.ndim != 4 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(f"key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)} {value.dtype}")
    if not (key.is_contiguous() and value.is_contiguous()):
        raise ValueError(f"blocks must be adjacent in memory, not {key.stride()} apart")


def _check_heads(query: Tensor, key: Tensor) -> None:
    """query [rows, query_heads, head_size] against key [..., kv_heads, head_size]."""
    if query.ndim != 3 or query.shape[2] != key.shape[-1]:
        raise ValueError(f"query {tuple(query.shape)} for keys {tuple(key.shape)}")
    if query.dtype != key.dtype or not query.is_floating_point() or query.device != key.device:
        raise ValueError(f"query {query.dtype} on {query.device}, keys {key.dtype} on {key.device}")
    if query.shape[1] == 0 or query.shape[1] % key.shape[-2] != 0:
        raise ValueError(f"{query.shape[1]} query heads do not divide over {key.shape[-2]} KV heads")


def _check_window(window: int | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} sees nothing")


def _check_range(span: Span, blocks: int, block_tokens: int) -> None:
    if not 0 <= span.visible_start <= span.visible_end <= len(span.blocks) * block_tokens:
        raise ValueError(f"{span}: visible slots lie outside {len(span.blocks)} blocks")
    if span.blocks and not (min(span.blocks) >= 0 and max(span.blocks) < blocks):
        raise ValueError(f"{span}: the cache has {blocks} blocks")


def _check_past(span: Span) -> None:
    if span.visible_end > span.visible_start and span.first_position + span.visible_end > span.query_position:
        raise ValueError(f"{span}: visible slots lie after the first row")


def _check_options(option: SlotOptions, span: Span, slots: int, query_heads: int) -> None:
    if option.positions is None:
        _check_past(span)
    for name, tensor in (("bias", option.bias), ("positions", option.positions)):
        if tensor is not None and tensor.shape != (slots,):
            raise ValueError(f"{name} {tuple(tensor.shape)} for {slots} slots")
    if option.mass_lse is not None and option.mass_lse.shape != (span.row_count, query_heads):
        raise ValueError(f"mass_lse {tuple(option.mass_lse.shape)} for {span.row_count} x {query_heads}")
