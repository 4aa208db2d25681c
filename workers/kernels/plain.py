"""Masked attention as two matrix products: what the fused kernel cannot do, on any device.

Windows that cut rows differently, biases, slots out of order, attention mass; and every case off the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_rows(query: Tensor, kv_heads: int) -> Tensor:
    """[rows, query_heads, head_size] -> [kv_heads, rows x group, head_size]: the query heads that share
    a KV head become rows over it (GQA).
    """
    rows, query_heads, head_size = query.shape
    if rows == 1:  # decoding: the heads lie in this order already
        return query.reshape(kv_heads, query_heads // kv_heads, head_size)
    grouped = query.reshape(rows, kv_heads, query_heads // kv_heads, head_size)
    return grouped.transpose(0, 1).reshape(kv_heads, -1, head_size)


def ungroup_rows(grouped: Tensor, rows: int) -> Tensor:
    """[kv_heads, rows x group, ...] -> [rows, query_heads, ...]: undoes `group_rows`."""
    kv_heads, tail = grouped.shape[0], grouped.shape[2:]
    if rows == 1:
        return grouped.reshape(1, -1, *tail)
    return grouped.reshape(kv_heads, rows, -1, *tail).transpose(0, 1).reshape(rows, -1, *tail)


def masked_scores(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None, seen: Tensor | None
) -> Tensor:
    """[kv_heads, rows x group, slots] float32 scores of query [rows, query_heads, head_size] against
    key [slots, kv_heads, head_size]; -inf where `seen` [rows, slots] is False. bias: [slots].
    """
    kv_heads = key.shape[1]
    scores = torch.matmul(group_rows(query.float(), kv_heads), key.float().permute(1, 2, 0)) * scale
    if bias is not None:
        scores += bias
    if seen is not None:
        by_row = scores.view(kv_heads, query.shape[0], query.shape[1] // kv_heads, key.shape[0])
        by_row.masked_fill_(~seen[None, :, None, :], -torch.inf)
    return scores


def weigh(scores: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """out [rows, query_heads, head_size] and lse [rows, query_heads] of masked scores over value
    [slots, kv_heads, head_size]; rows that saw nothing give 0 and -inf.
    """
    lse = torch.logsumexp(scores, -1)
    # -inf minus -inf is NaN: a row without a visible slot subtracts 0, and exp(-inf) is its weight.
    shift = torch.where(lse == -torch.inf, 0.0, lse)
    out = torch.matmul(torch.exp(scores - shift.unsqueeze(-1)), value.float().transpose(0, 1))
    return ungroup_rows(out, rows), ungroup_rows(lse, rows)
