"""Products of rows with packed bfloat16 weights: the boundary that checks each tensor, and one call."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cpu import _native
from workers.kernels.memory import Slabs

_PANEL = 16
_PAIR = 2 * _PANEL
"""Outputs that are computed together; their number is filled up to a multiple."""
_INPUTS = 32


class PackedProduct:
    """y = x weight^T + bias, rounded once, with weights in the order in which the processor reads them, on
    large pages: a step of few rows is one stream through them. Gated: silu of the first half of y times the
    second, rounded as that chain of operators would.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        slabs: Slabs,
        threads: int | None = None,
        level: str | None = None,
        *,
        gated: bool = False,
    ) -> None:
        """`weight` [outputs, inputs] and `bias` [outputs] of bfloat16; packed into `slabs`. `threads`: most
        of a call, PyTorch's number where None. `level`: of `_native.levels()`, the best where None. `gated`:
        the weight's first half is the gate's. Raises ValueError for weights that cannot be packed (`packs`),
        and for a bias that does not fit.
        """
        if not packs(weight) or (gated and weight.shape[0] % 2):
            raise ValueError(f"no packing of {weight.dtype} {list(weight.shape)} on {weight.device}")
        outputs, inputs = weight.shape
        if bias is not None and (bias.shape != (outputs,) or bias.dtype != torch.bfloat16):
            raise ValueError(f"a bias {list(bias.shape)} of {bias.dtype} for {outputs} outputs")
        self.outputs, self.inputs = outputs // 2 if gated else outputs, inputs
        self._is_gated = gated
        self._threads = threads
        self.level = level or _native.levels()[0]
        self._native = _native.RowOperators("bfloat16", self.level)
        self._weights = _packed(weight, slabs, gated=gated)
        self.bias = None if bias is None else bias.contiguous()
        bias_place = 0 if self.bias is None else self.bias.data_ptr()
        self.native: _native.PackedWeights = (
            *(self._weights.data_ptr(), bias_place, self.inputs, self.outputs, gated),
        )

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs], as it was given; a copy."""
        step = 2 if self._is_gated else 1
        sides = [self._weights[side::step].permute(0, 2, 1, 3) for side in range(step)]
        return torch.cat([side.reshape(-1, self.inputs)[: self.outputs] for side in sides])

    def __call__(self, inputs: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs], half as many of a gated one. Raises ValueError for rows that do
        not fit.
        """
        shape = inputs.shape
        if len(shape) != 2 or shape[1] != self.inputs or inputs.dtype != torch.bfloat16 or not inputs.is_cpu:
            raise ValueError(f"{inputs.dtype} {list(shape)} on {inputs.device} for {self.inputs} inputs")
        rows = inputs.contiguous()
        out = torch.empty((shape[0], self.outputs), dtype=torch.bfloat16)
        weights, bias, inputs_each, outputs, gated = self.native
        self._native.product(
            *(rows.data_ptr(), weights, bias, out.data_ptr(), shape[0], inputs_each, outputs, gated),
            self._threads or torch.get_num_threads(),
        )
        return out


def packs(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] can be packed."""
    fits = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] > 0 and weight.shape[1] % _INPUTS == 0
    return fits and weight.dtype is torch.bfloat16 and weight.is_cpu


def _packed(weight: Tensor, slabs: Slabs, *, gated: bool) -> Tensor:
    """[panels, inputs / 2, outputs of a panel, 2], as product.h draws it; outputs that are none are zero. Of
    a gated product every other panel is the gate's.
    """
    outputs, inputs = weight.shape
    panels = -(-outputs // _PAIR) * 2
    packed = slabs.take(panels * _PANEL * inputs * weight.itemsize).view(weight.dtype)
    packed = packed.view(panels, inputs // 2, _PANEL, 2)
    for side, half in enumerate(weight.chunk(2) if gated else (weight,)):
        _fill(packed[side :: 2 if gated else 1], half)
    return packed


def _fill(packed: Tensor, weight: Tensor) -> None:
    outputs, inputs = weight.shape
    whole = outputs // _PANEL
    rows = weight[: whole * _PANEL].view(whole, _PANEL, inputs // 2, 2)
    packed[:whole] = rows.permute(0, 2, 1, 3)
    left = weight[whole * _PANEL :]
    if len(left):
        packed[whole, :, : len(left)] = left.view(len(left), inputs // 2, 2).permute(1, 0, 2)
