"""A decoder's layer without its attention, over packed weights: three calls, and nothing of Python between
their products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.kernels.cpu import _native
from workers.kernels.cpu.kept import KeptMemory
from workers.kernels.cpu.product import PackedProduct

_between = KeptMemory(torch.bfloat16)
"""What lies between gate and down product of the layer that a thread computes."""


class PackedLayer:
    """One layer in bfloat16 on the CPU; rounds where the chain of its products and operators would.

    Shapes: hidden, normed [rows, hidden size]; tables, cosines and sines, [rows, 1, head size / 2] or None;
    attended [rows, query heads, head size]. All raise ValueError for tensors that do not fit.
    """

    def __init__(
        self,
        products: Sequence[PackedProduct],
        attended_norm: Tensor,
        head_norms: tuple[Tensor | None, Tensor | None],
        head_size: int,
        epsilon: float,
    ) -> None:
        """`products`: of query, of keys and values, of the output, gated, and down. `head_norms`: of query
        and key heads. Raises ValueError for products that do not follow on each other.
        """
        query, key_value, output, gated, down = products
        follow = (key_value.inputs, output.outputs, gated.inputs, down.outputs) == (query.inputs,) * 4
        if not follow or (output.inputs, down.inputs) != (query.outputs, gated.outputs):
            raise ValueError(f"no layer of {[(each.inputs, each.outputs) for each in products]}")
        self._head_size, self._size = head_size, query.inputs
        self._query, self._key_value, self._gated = query.outputs, key_value.outputs, gated.outputs
        self._weights = (*products, attended_norm, *head_norms)  # whose addresses the compiled layer has
        for norm, size in ((attended_norm, self._size), *((norm, head_size) for norm in head_norms)):
            if norm is not None:
                _require(norm, (size,))
        self._has_key_norm = head_norms[1] is not None
        self._native = _native.DecoderLayer(
            query.level,
            *(query.native, key_value.native, output.native, gated.native, down.native),
            *(_place(head_norms[0]), _place(head_norms[1]), _place(attended_norm)),
            head_size,
            epsilon,
        )

    def query(self, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Turned queries [rows, query heads, head size]."""
        rows, head_size = normed.shape[0], self._head_size
        places = self._places(normed, tables)
        out = torch.empty((rows, self._query // head_size, head_size), dtype=torch.bfloat16)
        self._native.query(*places, out.data_ptr(), rows, torch.get_num_threads())
        return out

    def key_value(self, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Turned keys, and values: [rows, KV heads, head size] each, whose rows may lie apart."""
        rows, head_size = normed.shape[0], self._head_size
        heads = self._key_value // (2 * head_size)
        places = self._places(normed, tables)
        out = torch.empty((rows, 2, heads, head_size), dtype=torch.bfloat16)
        keys, values = out.unbind(1)
        if self._has_key_norm:
            keys = torch.empty((rows, heads, head_size), dtype=torch.bfloat16)
        self._native.key_value(*places, out.data_ptr(), keys.data_ptr(), rows, torch.get_num_threads())
        return keys, values

    def absorb(self, hidden: Tensor, attended: Tensor, next_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and MLP with their residuals, in `hidden`'s memory; normed for what is next."""
        rows = hidden.shape[0]
        for tensor, shape in (
            (hidden, (rows, self._size)),
            (attended, (rows, self._query // self._head_size, self._head_size)),
            (next_norm, (self._size,)),
        ):
            _require(tensor, shape)
        normed = torch.empty((rows, self._size), dtype=torch.bfloat16)
        self._native.absorb(
            *(hidden.data_ptr(), attended.data_ptr(), next_norm.data_ptr()),
            *(_between.of((rows, self._gated))[1], normed.data_ptr(), rows, torch.get_num_threads()),
        )
        return hidden, normed

    def _places(self, normed: Tensor, tables: tuple[Tensor, Tensor] | None) -> tuple[int, int, int]:
        """Addresses of rows and tables."""
        rows = normed.shape[0]
        _require(normed, (rows, self._size))
        if tables is None:
            return normed.data_ptr(), 0, 0
        for table in tables:
            _require(table, (rows, 1, self._head_size // 2))
        return normed.data_ptr(), tables[0].data_ptr(), tables[1].data_ptr()


def _place(norm: Tensor | None) -> int:
    return 0 if norm is None else norm.data_ptr()


def _require(tensor: Tensor, shape: tuple[int, ...]) -> None:
    is_fit = tensor.dtype is torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous()
    if not is_fit or tensor.shape != shape:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)} on {tensor.device} where {list(shape)} is due")
