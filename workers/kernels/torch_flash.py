"""Attention with PyTorch's fused CPU kernel, which returns the log-sum-exp that partials need.

`aten._scaled_dot_product_flash_attention_for_cpu` takes strided views, so a run of adjacent blocks is read
where it lies; several runs are summed by the algebra of partials. What that kernel cannot do goes to `plain`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kernels import plain
from workers.kernels.checks import check_attend, check_causal
from workers.kernels.signature import AttendResult, LayerCache, SlotOptions, Span
from workers.kernels.token_major import TOKEN_MAJOR

_NONE = SlotOptions()

_RUN_TOKENS_LEAST = 256
"""Runs shorter than this on average are copied together first: a call costs what copying them does."""


class TorchKernel:
    """Keeps no state but a memo; on the CPU without options it copies no cache, elsewhere it uses `plain`."""

    name = "torch"
    layout = TOKEN_MAJOR

    def attend(
        self,
        query: Tensor,
        spans: Sequence[Span],
        cache: LayerCache,
        scale: float,
        window: int | None = None,
        options: Sequence[SlotOptions] | None = None,
    ) -> AttendResult:
        """See `signature.Kernel.attend`."""
        check_attend(query, spans, cache, window, options)
        out = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        lse = torch.full(query.shape[:2], -torch.inf, device=query.device)
        mass: list[Tensor | None] = []
        for index, span in enumerate(spans):
            option = options[index] if options else _NONE
            rows = slice(span.row_start, span.row_start + span.row_count)
            visible = _visible(span, option, window)
            if _asks_nothing(option) and query.device.type == "cpu" and not _cuts_rows(span, visible, window):
                if visible:
                    out[rows], lse[rows] = _fused(query[rows], span.blocks, visible, cache, scale)
                mass.append(None)
            else:
                out[rows], lse[rows], seen_mass = _masked(
                    query[rows], span, visible, cache, scale, window, option
                )
                mass.append(seen_mass)
        return AttendResult(out, lse, tuple(mass))

    def causal(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunks: Sequence[int],
        scale: float,
        window: int | None,
    ) -> AttendResult:
        """See `signature.Kernel.causal`."""
        check_causal(query, key, value, chunks, window)
        # Decoding rows see only themselves: out is their value, lse their own score. Longer chunks, if
        # there are any, overwrite their part below.
        group = query.shape[1] // key.shape[1]
        out = value.float().repeat_interleave(group, 1)
        lse = (query.float() * key.float().repeat_interleave(group, 1)).sum(-1) * scale
        start = 0
        for count in chunks:
            rows = slice(start, start + count)
            start += count
            if count > 1:
                fits = query.device.type == "cpu" and (window is None or window >= count)
                attend = _causal_fused if fits else _causal_masked
                out[rows], lse[rows] = attend(query[rows], key[rows], value[rows], scale, window)
        return AttendResult(out, lse, ())


def _asks_nothing(option: SlotOptions) -> bool:
    return option.bias is None and option.positions is None and option.mass_lse is None


def _visible(span: Span, option: SlotOptions, window: int | None) -> range:
    """The slots that at least the first row, whose window reaches furthest back, sees."""
    start = span.visible_start
    if window is not None and option.positions is None:
        start = max(start, span.query_position - window + 1 - span.first_position)
    return range(min(start, span.visible_end), span.visible_end)


def _cuts_rows(span: Span, visible: range, window: int | None) -> bool:
    """Whether the last row sees less of `visible` than the first."""
    if window is None or not visible:
        return False
    return span.query_position + span.row_count - window > span.first_position + visible.start


def _fused(
    query: Tensor, blocks: Sequence[int], visible: range, cache: LayerCache, scale: float
) -> tuple[Tensor, Tensor]:
    """out [rows, query_heads, head_size], lse [rows, query_heads] where every row sees all of `visible`."""
    rows, block_tokens = query.shape[0], cache.key.shape[1]
    grouped = plain.group_rows(query, cache.key.shape[2])[None]
    runs = _runs(tuple(blocks), visible.start, visible.stop, block_tokens)
    key, value = cache.key, cache.value
    if len(runs) > 1 and len(visible) < len(runs) * _RUN_TOKENS_LEAST:
        first = visible.start // block_tokens
        chosen = torch.tensor(blocks[first : -(-visible.stop // block_tokens)])
        key, value = key.index_select(0, chosen), value.index_select(0, chosen)
        runs = (range(visible.start - first * block_tokens, visible.stop - first * block_tokens),)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    parts = [_flash(grouped, key[run.start : run.stop], value[run.start : run.stop], scale) for run in runs]
    out, lse = parts[0] if len(parts) == 1 else _merge(parts)
    return plain.ungroup_rows(out, rows), plain.ungroup_rows(lse, rows)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [kv_heads, n, head_size], lse [kv_heads, n], both float32. query: [1, kv_heads, n, head_size];
    key, value: [slots, kv_heads, head_size], read where they lie.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key.transpose(0, 1)[None], value.transpose(0, 1)[None], scale=scale
    )
    return out[0].float(), lse[0]


@functools.lru_cache(maxsize=256)
def _runs(
    blocks: tuple[int, ...], visible_start: int, visible_stop: int, block_tokens: int
) -> tuple[range, ...]:
    """The slots of the layer's flat cache that the visible ones are, as few ranges as adjacency allows.

    Remembered, because all layers of a step ask the same.
    """
    runs: list[range] = []
    for index in range(visible_start // block_tokens, (visible_stop - 1) // block_tokens + 1):
        base = (blocks[index] - index) * block_tokens
        start = base + max(visible_start, index * block_tokens)
        stop = base + min(visible_stop, (index + 1) * block_tokens)
        if runs and runs[-1].stop == start:
            runs[-1] = range(runs[-1].start, stop)
        else:
            runs.append(range(start, stop))
    return tuple(runs)


def _merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum of partials that each saw at least one slot, in the order of the runs (DistAttention)."""
    lses = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total).unsqueeze(-1)
    out = parts[0][0] * weights[0]
    for (partial, _), weight in zip(parts[1:], weights[1:], strict=True):
        out.addcmul_(partial, weight)
    return out, total


def _masked(
    query: Tensor,
    span: Span,
    visible: range,
    cache: LayerCache,
    scale: float,
    window: int | None,
    option: SlotOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and, if asked for, the mass of each of the shard's slots."""
    block_tokens = cache.key.shape[1]
    slots = torch.arange(visible.start, visible.stop, device=query.device)
    table = torch.tensor(list(span.blocks), dtype=torch.int64, device=query.device)
    flat = table[slots // block_tokens] * block_tokens + slots % block_tokens
    key, value = cache.key.flatten(0, 1)[flat], cache.value.flatten(0, 1)[flat]
    positions = span.first_position + slots if option.positions is None else option.positions[slots]
    seen = _seen(positions, span.query_position, query.shape[0], window)
    bias = None if option.bias is None else option.bias[slots]
    scores = plain.masked_scores(query, key, scale, bias, seen)
    mass = None
    if option.mass_lse is not None:
        mass = torch.zeros(len(span.blocks) * block_tokens, device=query.device)
        mass[slots] = _mass(scores, option.mass_lse)
    return *plain.weigh(scores, value, query.shape[0]), mass


def _mass(scores: Tensor, lse: Tensor) -> Tensor:
    """[slots]: sum over rows and heads of exp(score - lse), lse [rows, query_heads]."""
    shift = lse.view(lse.shape[0], scores.shape[0], -1).transpose(0, 1).reshape(scores.shape[:2])
    weights = torch.exp(scores - shift.unsqueeze(-1))
    return weights.masked_fill(scores == -torch.inf, 0.0).sum((0, 1))


def _seen(positions: Tensor, first_row: int, rows: int, window: int | None) -> Tensor | None:
    """[rows, slots]: the row at p sees positions from p - window + 1 on."""
    if window is None:
        return None
    oldest = torch.arange(first_row, first_row + rows, device=positions.device) - window + 1
    return positions[None, :] >= oldest[:, None]


def _causal_fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, _window: int | None
) -> tuple[Tensor, Tensor]:
    """One chunk over itself. KV heads become the batch, and each is lent to its group without a copy."""
    rows, query_heads, head_size = query.shape
    kv_heads = key.shape[1]
    shape = (kv_heads, query_heads // kv_heads, rows, head_size)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.reshape(rows, *shape[:2], head_size).permute(1, 2, 0, 3),
        key.transpose(0, 1).unsqueeze(1).expand(shape),
        value.transpose(0, 1).unsqueeze(1).expand(shape),
        is_causal=True,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(query.shape).float(), lse.permute(2, 0, 1).reshape(
        rows, query_heads
    )


def _causal_masked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """One chunk over itself, with a window or off the CPU."""
    rows = query.shape[0]
    place = torch.arange(rows, device=query.device)
    age = place[:, None] - place[None, :]
    seen = (age >= 0) if window is None else (age >= 0) & (age < window)
    return plain.weigh(plain.masked_scores(query, key, scale, None, seen), value, rows)
