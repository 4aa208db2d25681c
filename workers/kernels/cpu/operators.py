"""The C++ operators over rows: the boundary that checks each tensor, and one call for each operator."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cpu import _native
from workers.kernels.cpu.kept import KeptMemory

_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class CpuOperators:
    """Norms, rotations, gates and merges of one dtype on the CPU, each one pass without a tensor in between.

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
        self._gated, self._merged = KeptMemory(dtype), KeptMemory(dtype)
        self._native = _native.RowOperators(_TYPES[dtype], level or _native.levels()[0])

    def rms_norm(self, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[rows, size] or [rows, heads, size], normed over the last axis, as a new tensor."""
        vectors = rows.unsqueeze(1) if rows.ndim == 2 else rows
        count, heads, size, stride = self._sizes(vectors)
        self._check_weight(weight, size)
        out = torch.empty(rows.shape, dtype=self._dtype)
        places = (rows.data_ptr(), 0, weight.data_ptr(), out.data_ptr())
        self._native.norm(*places, count, heads, size, stride, epsilon, self._threads_now())
        return out

    def add_rms_norm(
        self, hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        """The sum of [rows, size] and [rows, size], and its norm, in the memory of both arguments."""
        shape = self._whole(hidden)
        if len(shape) != 2 or self._whole(update) != shape:
            raise ValueError(f"an update {list(update.shape)} to {list(shape)}")
        rows, size = shape
        self._check_weight(weight, size)
        sum_place, norm_place = hidden.data_ptr(), update.data_ptr()
        places = (sum_place, norm_place, weight.data_ptr(), norm_place)
        self._native.norm(*places, rows, 1, size, size, epsilon, self._threads_now())
        return hidden, update

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`heads` [rows, heads, size], itself rotated by tables [rows, 1, size / 2]."""
        rows, count, size, stride = self._sizes(heads)
        for table in (cos, sin):
            if self._whole(table) != (rows, 1, size // 2) or size % 2 != 0:
                raise ValueError(f"tables {list(table.shape)} for heads {list(heads.shape)}")
        self._native.rotate(
            heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, count, size, stride, self._threads_now()
        )
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 x size], gate then up -> silu(gate) x up [rows, size]; until the thread's next call."""
        shape = self._whole(gate_up)
        if len(shape) != 2 or shape[1] % 2 != 0 or shape[1] == 0:
            raise ValueError(f"no gate and up of one size in {list(shape)}")
        rows, size = shape[0], shape[1] // 2
        kept, place = self._gated.of((rows, size))
        self._native.gate(gate_up.data_ptr(), place, rows, size, self._threads_now())
        return kept

    def merge_own(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, shards: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Rows over themselves and over shards of a cache, [rows, query heads, head size]; until the thread's
        next call.

        query: [rows, query heads, head size]; key, value: [rows, KV heads, head size]. shards: out and
        lse, float32 [shards x rows, query heads, head size] and [shards x rows, query heads], None for none.
        """
        rows, heads, size, query_stride = self._sizes(query)
        *key_shape, key_stride = self._sizes(key)
        *value_shape, value_stride = self._sizes(value)
        kv_heads = key_shape[1]
        if not key_shape == value_shape == [rows, kv_heads, size]:
            raise ValueError(f"keys {list(key.shape)}, values {list(value.shape)} for {list(query.shape)}")
        parts = (0, 0, 0) if shards is None else _parts(query.shape, *shards)
        kept, place = self._merged.of(query.shape)
        self._native.own(
            *(query.data_ptr(), heads, query_stride),
            *(key.data_ptr(), key_stride, value.data_ptr(), value_stride, kv_heads),
            *parts,
            scale,
            *(place, rows, size, self._threads_now()),
        )
        return kept

    def merge(
        self, own: tuple[Tensor, Tensor], shards: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> Tensor:
        """out and lse of what each row saw first, not nothing, and shards as in `merge_own`, merged into
        `dtype`, which is that of the operators: [rows, heads, size], until the thread's next call.
        """
        rows, heads, size = shape = own[0].shape
        if dtype != self._dtype:
            raise ValueError(f"{dtype} of operators over {self._dtype}")
        own_out, own_lse, _ = _parts(shape, *own)
        parts = (0, 0, 0) if shards is None else _parts(shape, *shards)
        kept, place = self._merged.of(shape)
        self._native.merge(own_out, own_lse, *parts, place, rows, heads, size, self._threads_now())
        return kept

    def best_two(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [rows, size >= 2] where each row's largest number stands first, int64; it; and the largest of
        all others, float32: [rows] each. NaN is the largest where there is one.
        """
        shape = self._whole(rows)
        if len(shape) != 2:
            raise ValueError(f"no rows in {list(shape)}")
        places = torch.empty(shape[0], dtype=torch.int64)
        best, second = torch.empty(shape[0]), torch.empty(shape[0])
        found = (places.data_ptr(), best.data_ptr(), second.data_ptr())
        self._native.best(rows.data_ptr(), *found, *shape, self._threads_now())
        return places, best, second

    def _sizes(self, vectors: Tensor) -> tuple[int, int, int, int]:
        """Rows, heads, numbers of a head, numbers from row to row; only rows may lie apart."""
        shape, strides = vectors.shape, vectors.stride()
        is_row = len(shape) == 3 and strides[2] == 1 and (shape[1] == 1 or strides[1] == shape[2])
        if not is_row or vectors.dtype != self._dtype or not vectors.is_cpu or 0 in shape[1:]:
            raise ValueError(f"{vectors.dtype} {list(shape)} on {vectors.device}, {strides} numbers apart")
        return shape[0], shape[1], shape[2], strides[0]

    def _check_weight(self, weight: Tensor, size: int) -> None:
        if self._whole(weight) != (size,) or size == 0:
            raise ValueError(f"a weight {list(weight.shape)} for {size} numbers")

    def _whole(self, tensor: Tensor) -> torch.Size:
        """Its shape. Few questions: after a matrix product each costs a microsecond of cold memory."""
        if tensor.dtype != self._dtype or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, {tensor.stride()} numbers apart"
            )
        return tensor.shape

    def _threads_now(self) -> int:
        return self._threads or torch.get_num_threads()


def _parts(shape: torch.Size, out: Tensor, lse: Tensor) -> tuple[int, int, int]:
    """Addresses of outputs and weights, and how many parts of `shape` stand there one after the other."""
    rows, heads, size = shape
    count = out.shape[0]
    fits = out.shape == (count, heads, size) and lse.shape == (count, heads) and rows > 0
    if not fits or count % rows != 0:
        raise ValueError(f"parts {list(out.shape)} and {list(lse.shape)} of rows {list(shape)}")
    for part in (out, lse):
        if part.dtype is not torch.float32 or not part.is_cpu or not part.is_contiguous():
            raise ValueError(f"a part of {part.dtype} on {part.device}, {part.stride()} numbers apart")
    return out.data_ptr(), lse.data_ptr(), count // rows
