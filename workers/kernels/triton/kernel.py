"""The Triton backend: both stages behind the signature."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from workers.kernels.checks import check_attend, check_causal
from workers.kernels.signature import AttendResult, LayerCache, SlotOptions, Span
from workers.kernels.torch_flash import TorchKernel
from workers.kernels.triton.attend import attend
from workers.kernels.triton.layout import TritonLayout
from workers.kernels.triton.merge import merge
from workers.kernels.triton.tables import (
    Cutting,
    SpanTables,
    TableMemo,
    key_of,
    tables_of_chunks,
    tables_of_spans,
)
from workers.kernels.triton.tiling import SPLIT_SLOTS_LEAST

_BATCHES_REMEMBERED = 32
"""Several lanes, slices of long chunks, and a window of its own for some layers."""


class TritonKernel:
    """Keeps no state but a memo of tables. Options of KV policies go to the PyTorch backend.

    Same batch, same cuts, same order of sums: results repeat to the bit.
    """

    name = "triton"
    layout = TritonLayout()

    def __init__(self, split_slots_least: int = SPLIT_SLOTS_LEAST) -> None:
        self._split_slots_least = split_slots_least
        self._memo = TableMemo(_BATCHES_REMEMBERED)
        self._plain = TorchKernel()

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
        if options is not None:
            return self._plain.attend(query, spans, cache, scale, window, options)

        def build() -> SpanTables:
            check_attend(query, spans, cache, window, None)
            return tables_of_spans(
                spans, query.shape[0], window, self._cutting(query, cache.key), query.device
            )

        # All that is checked is in the key: a batch that was checked once need not be again for each layer.
        looks = (_look(query), _look(cache.key), _look(cache.value))
        key = (*looks, window, *map(key_of, spans))
        tables = self._memo.get(key, [span.blocks for span in spans], build)
        out, lse = _run(query, cache.key, cache.value, tables, scale, window)
        return AttendResult(out, lse, (None,) * len(spans))

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
        cutting = self._cutting(query, key)
        tables = self._memo.get(
            (cutting, query.device, *chunks), None, lambda: tables_of_chunks(chunks, cutting, query.device)
        )
        key, value = _with_adjacent_heads(key), _with_adjacent_heads(value)
        out, lse = _run(query, key, value, tables, scale, window)
        return AttendResult(out, lse, ())

    def _cutting(self, query: Tensor, key: Tensor) -> Cutting:
        kv_heads, head_size = key.shape[-2:]
        return Cutting(query.shape[1], kv_heads, head_size, key.element_size(), self._split_slots_least)


def _look(tensor: Tensor) -> Hashable:
    """What checks look at."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()


def _with_adjacent_heads(part: Tensor) -> Tensor:
    """[rows, kv_heads, head_size] whose heads lie side by side: a copy if they do not."""
    return part if part.stride()[1:] == (part.shape[2], 1) else part.contiguous()


def _run(
    query: Tensor, key: Tensor, value: Tensor, tables: SpanTables, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Both stages: out [rows, query_heads, head_size] and lse [rows, query_heads], float32."""
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if query.shape[0] == 0:
        return out, lse
    partials = (out.new_empty(tables.partial_rows, query.shape[2]), lse.new_empty(tables.partial_rows))
    attend(query.contiguous(), key, value, tables, scale, window, partials)
    merge(partials, tables, key.shape[-2], out, lse)
    return out, lse
