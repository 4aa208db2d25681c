"""Rows of keys and values into the C++ kernel's packed cache and out of it."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.select import compiled_kernel
from workers.kernels.signature import CacheShape

if compiled_kernel() is None:
    pytest.skip("the C++ kernel is not built", allow_module_level=True)

from workers.kernels.cpu.layout import PackedLayout

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@pytest.mark.parametrize("block_tokens", [1, 7, 16, 32])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_come_back_as_they_went_in(dtype: torch.dtype, block_tokens: int) -> None:
    """Bit for bit; int8 within half a step of its scale. No other slot moves."""
    layout = PackedLayout()
    for head_size in (8, 80, 64):
        cache = layout.allocate(CacheShape(1, 5, block_tokens, 3, head_size, dtype), torch.device("cpu"))[0]
        count = min(5 * block_tokens, 40)
        slots = torch.randperm(5 * block_tokens)[:count]
        rows = torch.float32 if dtype == torch.int8 else dtype
        key, value = torch.randn(count, 3, head_size).to(rows), torch.randn(count, 3, head_size).to(rows)
        layout.append(cache, slots, key, value)
        for read, written in zip(layout.read(cache, slots), (key, value), strict=True):
            step = written.abs().amax(-1, keepdim=True) / 127 if dtype == torch.int8 else 0
            assert bool(((read - written).abs() <= step * 0.5001).all())
        others = torch.tensor(sorted(set(range(5 * block_tokens)) - set(slots.tolist())), dtype=torch.int64)
        assert dtype == torch.int8 or not layout.read(cache, others)[1].any()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_of_any_stride_and_type_go_in_as_their_copies_do(dtype: torch.dtype) -> None:
    """Keys and values within one projection, transposed and converted ones leave the bytes of copies."""
    layout, shape = PackedLayout(), CacheShape(1, 2, 16, 3, 64, dtype)
    rows = torch.float32 if dtype == torch.int8 else dtype
    slots = torch.randperm(32)[:20][::2]  # strided as well
    fused = torch.randn(10, 2, 3, 64).to(rows)
    transposed = torch.randn(10, 64, 3).to(rows).transpose(1, 2)
    for key, value in (
        fused.unbind(1),
        (transposed, fused[:, 0]),
        (fused[:, 0].double(), fused[:, 1].double()),
    ):
        strided, copied = (layout.allocate(shape, torch.device("cpu"))[0] for _ in range(2))
        layout.append(strided, slots, key, value)
        layout.append(copied, slots.contiguous(), key.to(rows).contiguous(), value.to(rows).contiguous())
        assert torch.equal(strided.key, copied.key)
        assert torch.equal(strided.value, copied.value)


@pytest.mark.parametrize("block_tokens", [7, 16, 24, 64])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_many_rows_go_in_as_each_by_itself_does(dtype: torch.dtype, block_tokens: int) -> None:
    """Whole groups of tokens, parts of them before and behind, and enough for several threads."""
    layout = PackedLayout()
    for head_size in (64, 80, 9):
        blocks = -(-1600 // block_tokens)
        shape = CacheShape(1, blocks, block_tokens, 3, head_size, dtype)
        together, apart = (layout.allocate(shape, torch.device("cpu"))[0] for _ in range(2))
        slots = torch.cat((torch.arange(3, 820), torch.arange(1500, 1550), torch.arange(900, 1200)))
        rows = torch.float32 if dtype == torch.int8 else dtype
        key, value = torch.randn(len(slots), 2, 3, head_size).to(rows).unbind(1)
        layout.append(together, slots, key, value)
        for row in range(len(slots)):
            one = slice(row, row + 1)
            layout.append(apart, slots[one], key[one], value[one])
        assert torch.equal(together.key, apart.key)
        assert torch.equal(together.value, apart.value)
