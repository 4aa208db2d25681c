"""The specification of every backend: attention row by row and head by head, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kernels.checks import check_attend, check_causal
from workers.kernels.signature import AttendResult, LayerCache, SlotOptions, Span
from workers.kernels.token_major import TOKEN_MAJOR

_NONE = SlotOptions()


class ReferenceKernel:
    """Slow and obvious. Every other backend must equal it within the tolerance of its dtype."""

    name = "reference"
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
        out, lse = _empty(query)
        mass: list[Tensor | None] = []
        for span, option in zip(spans, options or [_NONE] * len(spans), strict=True):
            key, value = _slots(cache.key, span), _slots(cache.value, span)
            positions = _positions(span, option, key.shape[0])
            collected = torch.zeros(key.shape[0]) if option.mass_lse is not None else None
            for row in range(span.row_count):
                seen = _seen(span, positions, span.query_position + row, window)
                for head in range(query.shape[1]):
                    place = (span.row_start + row, head)
                    kv_head = head // (query.shape[1] // key.shape[1])
                    scores = key[:, kv_head] @ query[place].double() * scale
                    if option.bias is not None:
                        scores = scores + option.bias
                    out[place], lse[place] = _weigh(scores[seen], value[seen, kv_head])
                    if collected is not None and option.mass_lse is not None:
                        collected[seen] += torch.exp(scores[seen] - option.mass_lse[row, head]).float()
            mass.append(collected)
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
        out, lse = _empty(query)
        group = query.shape[1] // key.shape[1]
        start = 0
        for count in chunks:
            for row in range(start, start + count):
                first = start if window is None else max(start, row - window + 1)
                for head in range(query.shape[1]):
                    keys = key[first : row + 1, head // group].double()
                    values = value[first : row + 1, head // group].double()
                    out[row, head], lse[row, head] = _weigh(keys @ query[row, head].double() * scale, values)
            start += count
        return AttendResult(out, lse, ())


def _empty(query: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs in which no row has seen anything."""
    return torch.zeros(query.shape), torch.full(query.shape[:2], -torch.inf)


def _slots(part: Tensor, span: Span) -> Tensor:
    """[slots, kv_heads, head_size] float64: the shard's blocks one after the other."""
    return part[list(span.blocks)].flatten(0, 1).double()


def _positions(span: Span, option: SlotOptions, slots: int) -> list[int]:
    if option.positions is not None:
        return [int(position) for position in option.positions]
    return list(range(span.first_position, span.first_position + slots))


def _seen(span: Span, positions: list[int], row_position: int, window: int | None) -> list[int]:
    """The slots the row at `row_position` sees."""
    first = 0 if window is None else row_position - window + 1
    return [slot for slot in range(span.visible_start, span.visible_end) if positions[slot] >= first]


def _weigh(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) values and ln sum exp scores; 0 and -inf where there are none."""
    if len(scores) == 0:
        return torch.zeros(values.shape[1]), torch.tensor(-torch.inf)
    lse = torch.logsumexp(scores, 0)
    return (torch.exp(scores - lse) @ values).float(), lse.float()
