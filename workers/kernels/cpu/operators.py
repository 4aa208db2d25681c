"""The C++ operators over rows: the boundary that checks each tensor, and one call for each operator."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cpu import _native

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class CpuOperators:
    """Norms, rotations and gates of one dtype on the CPU, each one pass and without a tensor in between.

    Rounds where the same chain of PyTorch operators would. All raise ValueError for a tensor that does not
    fit: another dtype or device, rows that are not contiguous, shapes that disagree.
    """

    def __init__(self, dtype: torch.dtype, threads: int | None = None, level: str | None = None) -> None:
        """`threads`: most of a call, PyTorch's number where None. `level`: an instruction set of
        `_native.levels()`, the best where None. Raises ValueError for a dtype or level there is not.
        """
        if dtype not in _TYPES:
            raise ValueError(f"no operators over {dtype}; there are {list(_TYPES)}")
        self._dtype = dtype
        self._threads = threads
        self._native = _native.RowOperators(_TYPES[dtype], level or _native.levels()[0])

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[rows, size] or [rows, heads, size], normed over the last axis with `weight` [size]; a new tensor."""
        out = torch.empty(rows.shape, dtype=self._dtype)
        self._norm(rows, 0, weight, out, epsilon)
        return out

    def add_rms_norm(
        self, hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of [rows, size] and [rows, size], and its norm, in the memory of both arguments."""
        if update.shape != hidden.shape:
            raise ValueError(f"an update {list(update.shape)} to {list(hidden.shape)}")
        self._check_whole(update)
        self._norm(hidden, update.data_ptr(), weight, update, epsilon)
        return hidden, update

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`heads` [rows, heads, size], itself rotated by tables [rows, 1, size / 2]."""
        rows, count, size, stride = self._vectors(heads)
        for table in (cos, sin):
            self._check_whole(table)
            if size % 2 != 0 or table.shape != (rows, 1, size // 2):
                raise ValueError(f"tables {list(table.shape)} for heads {list(heads.shape)}")
        self._native.rotate(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, count, size, stride, self._threads_now()
        )
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 x size], gate then up -> silu(gate) x up [rows, size], a new tensor."""
        self._check_whole(gate_up)
        if gate_up.ndim != 2 or gate_up.shape[1] % 2 != 0 or gate_up.shape[1] == 0:
            raise ValueError(f"no gate and up of one size in {list(gate_up.shape)}")
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, size), dtype=self._dtype)
        self._native.gate(gate_up.data_ptr(), out.data_ptr(), rows, size, self._threads_now())
        return out

    def _norm(self, rows: Tensor, update: int, weight: Tensor, out: Tensor, epsilon: float) -> None:
        """`update`: an address, or 0 for none."""
        count, heads, size, stride = self._vectors(rows)
        self._check_whole(weight)
        if weight.shape != (size,):
            raise ValueError(f"a weight {list(weight.shape)} for {list(rows.shape)}")
        self._native.norm(
            rows.data_ptr(),
            update,
            weight.data_ptr(),
            out.data_ptr(),
            count,
            heads,
            size,
            stride,
            epsilon,
            self._threads_now(),
        )

    def _vectors(self, rows: Tensor) -> tuple[int, int, int, int]:
        """Rows, heads, numbers of a head, numbers from row to row; only rows may lie apart."""
        shape, strides = rows.shape, rows.stride()
        if len(shape) == 2:
            shape, strides = torch.Size((shape[0], 1, shape[1])), (strides[0], shape[1], strides[1])
        is_row = len(shape) == 3 and strides[2] == 1 and (shape[1] == 1 or strides[1] == shape[2])
        if not is_row or rows.dtype != self._dtype or not rows.is_cpu or 0 in shape[1:]:
            raise ValueError(f"{rows.dtype} {list(shape)} on {rows.device}, {strides} numbers apart")
        return shape[0], shape[1], shape[2], strides[0]

    def _check_whole(self, tensor: Tensor) -> None:
        if tensor.dtype != self._dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, {tensor.stride()} numbers apart"
            )

    def _threads_now(self) -> int:
        return self._threads or torch.get_num_threads()
