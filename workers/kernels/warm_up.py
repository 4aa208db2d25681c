"""Computing once what a first step would wait for otherwise: a GPU kernel is compiled when first called.

That takes seconds, and the other side of a lane waits no longer than its deadline.
"""

from __future__ import annotations

import torch

from workers.kernels.signature import Kernel, LayerCache, Span

_ROWS = (1, 64)
"""A decoding row and a chunk: backends cut them differently."""


def warm_up_attend(kernel: Kernel, cache: LayerCache, query_heads: int) -> None:
    """Attend the first slot of `cache` [blocks, block_tokens, kv_heads, head_size], whatever lies there."""
    for rows in _ROWS:
        query = torch.zeros(
            rows, query_heads, cache.key.shape[-1], dtype=cache.key.dtype, device=cache.key.device
        )
        kernel.attend(query, [Span(0, rows, 1, (0,), 0, 0, 1)], cache, 1.0)
    torch.cuda.synchronize(cache.key.device)


def warm_up_causal(
    kernel: Kernel, heads: tuple[int, int], head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Attend chunks over themselves, laid out as fused projections leave them; heads: of query and of KV."""
    for rows in _ROWS:
        query = torch.zeros(rows, heads[0], head_size, dtype=dtype, device=device)
        fused = torch.zeros(rows, 2 * heads[1], head_size, dtype=dtype, device=device)
        keys, values = fused.chunk(2, dim=1)
        kernel.causal(query, keys.contiguous(), values, [rows], 1.0, None)
    torch.cuda.synchronize(device)
