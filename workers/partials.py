"""The algebra of DistAttention: attention over parts of a cache, and the sum of the parts.

For one query row and head, a shard with keys k_i and values v_i gives m = max_i s_i over its scores
s_i, e = sum_i exp(s_i - m) and the average of its values under the softmax of its own scores. We keep
the pair (out, lse) with lse = m + ln e, which is the (m, e, MA) triple of Infinite-LLM (arXiv
2401.02669, section on DistAttention) with out = MA / e. Then

    merge: lse = ln sum_j exp(lse_j),   out = sum_j exp(lse_j - lse) out_j

is associative and commutative up to rounding, and the empty shard (out = 0, lse = -inf) is its
identity. Adding a constant to all scores adds it to every lse and changes no output.

An lse is float32, so its rounding is |lse| 2^-24: scores of the size that overflows float16 (65,504)
cost a relative error of 0.4 % in the weights of a merge, and nothing where one shard dominates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Partial:
    """Attention of some query rows over one part of the cache, all of it or nothing.

    A row that saw no token (empty or fully masked) has out = 0 and lse = -inf, never NaN.
    """

    out: Tensor
    """[rows, query_heads, head_size] float32: values averaged under the part's own softmax."""

    lse: Tensor
    """[rows, query_heads] float32: natural log of the sum of exp(score) over the part."""

    mass: Tensor | None = None
    """[rows, query_heads, tokens] float32, only where a KV policy asks: each token's softmax weight
    within the part."""

    def __post_init__(self) -> None:
        assert self.out.ndim == 3, f"out must be [rows, query_heads, head_size], not {tuple(self.out.shape)}"
        assert self.lse.shape == self.out.shape[:2], (
            f"lse {tuple(self.lse.shape)} for out {tuple(self.out.shape)}"
        )
        assert self.out.dtype == self.lse.dtype == torch.float32, "partials travel in float32"
        assert self.mass is None or self.mass.shape[:2] == self.lse.shape, "mass is per row and head"


def empty(rows: int, query_heads: int, head_size: int, device: torch.device | None = None) -> Partial:
    """The partial of a shard without tokens: the identity of `merge`."""
    return Partial(
        out=torch.zeros(rows, query_heads, head_size, device=device),
        lse=torch.full((rows, query_heads), -torch.inf, device=device),
    )


def merge(partials: Sequence[Partial]) -> Partial:
    """The partial over the union of disjoint parts, summed in the order given.

    All partials have the same rows and heads. The order fixes the rounding: give shards in the order
    of their token ranges and the result is bit-identical from run to run. `mass` is rescaled and
    concatenated along tokens when every part carries it, dropped otherwise.
    """
    assert partials, "merge needs at least one partial; use empty() for none"
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([partial.lse for partial in partials])  # [parts, rows, query_heads]
    peak = lses.amax(0)
    # Where every part is empty the peak is -inf, and -inf minus -inf is NaN: subtract zero instead.
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(lses - peak)
    # The largest part contributes exactly 1, so total is at least 1, or 0 where all parts are empty.
    total = weights.sum(0)
    weights = weights / total.clamp_min(1.0)
    out = partials[0].out * weights[0].unsqueeze(-1)
    for partial, weight in zip(partials[1:], weights[1:], strict=True):
        out.addcmul_(partial.out, weight.unsqueeze(-1))
    return Partial(out, peak + torch.log(total), _merge_mass(partials, weights))


def merged_out(own: Partial, out: Tensor, lse: Tensor) -> Tensor:
    """The out of `merge` over `own`, each row of which saw something, and shards that stand one after the
    other: [shards x rows, query_heads, head_size] and [shards x rows, query_heads].
    """
    rows = own.out.shape[0]
    if out.shape[0] == rows:
        # Two weights that sum to 1 are one sigmoid of the difference of their logarithms: quicker sevenfold.
        return torch.lerp(own.out, out, torch.sigmoid(lse - own.lse).unsqueeze(-1))
    shards = zip(torch.split(out, rows), torch.split(lse, rows), strict=True)
    return merge([own, *(Partial(*shard) for shard in shards)]).out


def _merge_mass(partials: Sequence[Partial], weights: Tensor) -> Tensor | None:
    """Each part's token weights times the part's weight; weights are [parts, rows, query_heads]."""
    masses = [partial.mass for partial in partials if partial.mass is not None]
    if len(masses) < len(partials):
        return None
    return torch.cat(
        [mass * weight.unsqueeze(-1) for mass, weight in zip(masses, weights, strict=True)], dim=-1
    )
