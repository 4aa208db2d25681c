"""Compiled products over packed weights: against float64, at every level, for any rows and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.dense.operators import TorchOperators
from workers.dense.weights import GatedLinear, Linear, projection
from workers.kernels.select import compiled_kernel

if compiled_kernel() is None:
    pytest.skip("the C++ kernel is not built", allow_module_level=True)

from workers.kernels.cpu.kernel import levels
from workers.kernels.cpu.product import PackedProduct, packs
from workers.kernels.memory import Slabs

SHAPES = ((576, 576), (40, 64), (16, 32), (97, 1536))
"""(outputs, inputs): also such as leave panels in part or wholly empty."""
ROWS = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 70, 300)
BOUND = 4.5e-3
"""Beside the largest number of a row: half a unit of bfloat16's last place, and sums in single precision."""

PLAIN = TorchOperators()
every_level = pytest.mark.parametrize("level", levels())


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@every_level
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_biased", [False, True])
def test_products_are_those_of_float64(level: str, shape: tuple[int, int], is_biased: bool) -> None:
    """Rounded once, whatever the number of rows; weights are found again as they were given."""
    weight, bias = numbers(*shape, seed=1), numbers(shape[0], seed=2) if is_biased else None
    product = PackedProduct(weight, bias, Slabs(), level=level)
    assert torch.equal(product.weight, weight)
    for rows in ROWS:
        inputs = numbers(rows, shape[1], seed=rows)
        exact = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
        found = product(inputs)
        assert found.shape == (rows, shape[0])
        if rows:
            error = (found.double() - exact).abs().amax(-1) / exact.abs().amax(-1)
            assert float(error.max()) < BOUND


@every_level
@pytest.mark.parametrize("shape", [(1152, 576), (40, 64), (2, 32), (194, 96)], ids=str)
@pytest.mark.parametrize("is_biased", [False, True])
def test_gated_products_are_those_of_the_chain(level: str, shape: tuple[int, int], is_biased: bool) -> None:
    """silu of the gate times up, from the same products: but for a unit where a sum was rounded the other way
    or is nothing beside the smallest normal number.
    """
    weight, bias = numbers(*shape, seed=1), numbers(shape[0], seed=2) if is_biased else None
    gated = PackedProduct(weight, bias, Slabs(), level=level, gated=True)
    plain = PackedProduct(weight, bias, Slabs(), level=level)
    assert torch.equal(gated.weight, weight)
    for rows in ROWS:
        inputs = numbers(rows, shape[1], seed=rows)
        found, chain = gated(inputs), PLAIN.silu_mul(plain(inputs))
        assert found.shape == (rows, shape[0] // 2)
        torch.testing.assert_close(found, chain, rtol=2**-7, atol=1e-30)
        assert not rows or float((found != chain).double().mean()) <= 0.01


@every_level
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [5, 13, 16, 300])
def test_threads_and_other_rows_change_no_bit(level: str, gated: bool, rows: int) -> None:
    """A row's product is the same with two threads as with one, whether they share its outputs or the rows,
    and alone as in any batch of few rows.
    """
    weight, inputs = numbers(576, 576, seed=1), numbers(rows, 576, seed=2)
    one, two = (PackedProduct(weight, None, Slabs(), threads, level, gated=gated) for threads in (1, 2))
    assert torch.equal(one(inputs), two(inputs))
    alone = torch.cat([one(row[None]) for row in inputs[:16]])
    assert torch.equal(alone, one(inputs[:16]))


def test_rows_that_do_not_fit_are_refused() -> None:
    """Another width, dtype or number of axes; rows that lie apart are taken."""
    product = PackedProduct(numbers(64, 64, seed=1), None, Slabs())
    for wrong in (numbers(2, 32, seed=1), numbers(2, 64, seed=1).float(), numbers(64, seed=1)):
        with pytest.raises(ValueError, match="for 64 inputs"):
            product(wrong)
    wide = numbers(4, 128, seed=3)
    assert torch.equal(product(wide[:, :64]), product(wide[:, :64].contiguous()))
    with pytest.raises(ValueError, match="a bias"):
        PackedProduct(numbers(64, 64, seed=1), numbers(32, seed=1), Slabs())


@pytest.mark.parametrize(
    "weight", [torch.ones(64, 64), torch.ones(64, 33).bfloat16(), torch.ones(0, 32).bfloat16()]
)
def test_what_cannot_be_packed_is_pytorch_s(weight: Tensor) -> None:
    """Float32, inputs that are no multiple of 32, and nothing."""
    assert not packs(weight)
    assert isinstance(projection(weight, None, Slabs()), Linear)
    assert isinstance(projection(weight, None, Slabs(), gated=True), GatedLinear)
    with pytest.raises(ValueError, match="no packing"):
        PackedProduct(weight, None, Slabs())
    with pytest.raises(ValueError, match="no packing"):
        PackedProduct(torch.ones(33, 64).bfloat16(), None, Slabs(), gated=True)
    assert isinstance(projection(torch.ones(64, 64).bfloat16(), None, Slabs()), PackedProduct)
