"""What a decoder does to rows between its matrix products: with PyTorch, or one compiled pass each."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from workers.dense.rope import rotate
from workers.kernels.select import has_compiled_code
from workers.partials import Partial, merged_out


class RowOperators(Protocol):
    """Operators over rows of one dtype on one device, the activations' and the weights'.

    Arguments other than weights and tables are given up: an implementation may answer in their memory. They
    are contiguous but for the rows of heads, which may lie apart. Sums are in float32; results are rounded
    to the dtype after the same operations as transformers' are.
    """

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm over the last axis of [rows, size] or [rows, heads, size]; `weight` is [size]."""
        ...

    def add_rms_norm(
        self, hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """`hidden` + `update`, each [rows, size], and the norm of the sum."""
        ...

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`heads` [rows, heads, head_size] rotated by tables [rows, 1, head_size / 2]."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 x size], gate then up -> silu(gate) x up [rows, size]; until the thread's next call."""
        ...

    def merge_own(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, shards: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Attention of rows that see themselves and shards of a cache; until the thread's next call.

        query: [rows, query heads, head size]; key, value: [rows, KV heads, head size], all of the rows'
        dtype. shards: out and lse of what the rows see elsewhere, float32 [shards x rows, query heads, head
        size] and [shards x rows, query heads], or None where that is nothing. Merged in float32, themselves
        first.
        """
        ...

    def merge(
        self, own: tuple[Tensor, Tensor], shards: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """out and lse of what each row saw first, not nothing, and shards as in `merge_own`, merged in
        float32 into `dtype`: [rows, query heads, head size]; until the thread's next call.
        """
        ...

    def best_two(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [rows, size >= 2]: where each row's largest number stands, int64; it; and the largest of all
        others: [rows] each. A row with a NaN has NaN for its largest. Changes nothing.
        """
        ...


class TorchOperators:
    """Any device and dtype; every step a tensor of its own. The specification of the compiled ones."""

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Computed in float32, rounded, then weighted in the rows' dtype."""
        wide = rows.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return weight * (wide * scale).to(rows.dtype)

    def add_rms_norm(
        self, hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """See `RowOperators.add_rms_norm`."""
        total = hidden + update
        return total, self.rms_norm(total, weight, epsilon)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `RowOperators.rotate`."""
        return rotate(heads, cos, sin)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `RowOperators.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def merge_own(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, shards: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `RowOperators.merge_own`."""
        group = query.shape[1] // key.shape[1]
        scores = (query.float() * key.float().repeat_interleave(group, 1)).sum(-1) * scale
        own = (value.float().repeat_interleave(group, 1), scores)
        return self.merge(own, shards, query.dtype)

    def merge(
        self, own: tuple[Tensor, Tensor], shards: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """See `RowOperators.merge`."""
        merged = own[0] if shards is None else merged_out(Partial(*own), *shards)
        return merged.to(dtype)

    def best_two(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `RowOperators.best_two`."""
        best, places = rows.max(-1)
        second = rows.scatter(-1, places.unsqueeze(-1), -torch.inf).amax(-1)
        return places, best, second


def select_operators(dtype: torch.dtype, device: torch.device) -> RowOperators:
    """The compiled operators where they are built and serve `dtype` on `device`, else PyTorch's."""
    is_served = device.type == "cpu" and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not is_served or not has_compiled_code():
        return TorchOperators()
    from workers.kernels.cpu.operators import CpuOperators  # only now: it imports the extension

    return CpuOperators(dtype)
