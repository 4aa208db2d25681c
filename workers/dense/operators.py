"""What a decoder does to rows between its matrix products: with PyTorch, or one compiled pass each."""

from __future__ import annotations

import importlib
from typing import Protocol

import torch
from torch import Tensor

from workers.dense.rope import rotate


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


def select_operators(dtype: torch.dtype, device: torch.device) -> RowOperators:
    """The compiled operators where they are built and serve `dtype` on `device`, else PyTorch's."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return TorchOperators()
    try:
        importlib.import_module("workers.kernels.cpu._native")
    except ImportError:
        return TorchOperators()
    from workers.kernels.cpu.operators import CpuOperators  # only now: it imports the extension

    return CpuOperators(dtype)
