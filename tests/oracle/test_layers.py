"""A layer's compiled calls beside its products and operators one after the other: the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.dense.layers import PlainLayer, decoder_layer
from workers.dense.weights import LayerWeights, projection
from workers.kernels.select import compiled_kernel

if compiled_kernel() is None:
    pytest.skip("the C++ kernel is not built", allow_module_level=True)

from workers.kernels.cpu.decoder_layer import PackedLayer
from workers.kernels.cpu.kernel import levels
from workers.kernels.cpu.operators import CpuOperators
from workers.kernels.cpu.product import PackedProduct
from workers.kernels.memory import Slabs

HIDDEN, BETWEEN, HEADS, KV_HEADS, HEAD_SIZE = 96, 160, 3, 1, 32
EPSILON = 1e-5


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer_weights(
    level: str | None = None, *, is_biased: bool = False, has_norms: bool = False
) -> LayerWeights:
    """Of a small layer, with products at a level of the compiled code."""
    slabs = Slabs()

    def product(outputs: int, inputs: int, seed: int, *, gated: bool = False) -> PackedProduct:
        bias = numbers(outputs, seed=seed + 10) if is_biased else None
        return PackedProduct(numbers(outputs, inputs, seed=seed), bias, slabs, level=level, gated=gated)

    return LayerWeights(
        input_norm=numbers(HIDDEN, seed=20),
        query=product(HEADS * HEAD_SIZE, HIDDEN, 1),
        key_value=product(2 * KV_HEADS * HEAD_SIZE, HIDDEN, 2),
        query_norm=numbers(HEAD_SIZE, seed=21) if has_norms else None,
        key_norm=numbers(HEAD_SIZE, seed=22) if has_norms else None,
        output=product(HIDDEN, HEADS * HEAD_SIZE, 3),
        post_attention_norm=numbers(HIDDEN, seed=23),
        gated=product(2 * BETWEEN, HIDDEN, 4, gated=True),
        down=product(HIDDEN, BETWEEN, 5),
    )


def packed(weights: LayerWeights) -> PackedLayer:
    """The compiled layer of these weights."""
    products = (weights.query, weights.key_value, weights.output, weights.gated, weights.down)
    compiled = [product for product in products if isinstance(product, PackedProduct)]
    norms = (weights.query_norm, weights.key_norm)
    return PackedLayer(compiled, weights.post_attention_norm, norms, HEAD_SIZE, EPSILON)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("has_norms", [False, True], ids=["", "normed heads"])
@pytest.mark.parametrize("is_turned", [True, False], ids=["turned", "not turned"])
def test_the_same_bits_as_one_after_the_other(level: str, has_norms: bool, is_turned: bool) -> None:
    """Queries, keys, values, the residual and what is normed for the next layer, for any number of rows."""
    weights = layer_weights(level, is_biased=is_turned, has_norms=has_norms)
    plain = PlainLayer(weights, CpuOperators(torch.bfloat16, level=level), HEAD_SIZE, EPSILON)
    compiled = packed(weights)
    for rows in (1, 3, 17, 300):
        normed, hidden = numbers(rows, HIDDEN, seed=30), numbers(rows, HIDDEN, seed=31)
        tables = (numbers(rows, 1, HEAD_SIZE // 2, seed=32), numbers(rows, 1, HEAD_SIZE // 2, seed=33))
        turns = tables if is_turned else None
        attended, norm = numbers(rows, HEADS, HEAD_SIZE, seed=34), numbers(HIDDEN, seed=35)
        assert torch.equal(compiled.query(normed, turns), plain.query(normed, turns))
        for found, chain in zip(
            compiled.key_value(normed, turns), plain.key_value(normed, turns), strict=True
        ):
            assert found.shape == (rows, KV_HEADS, HEAD_SIZE)
            assert torch.equal(found, chain)
        absorbed = compiled.absorb(hidden.clone(), attended, norm)
        for found, chain in zip(absorbed, plain.absorb(hidden.clone(), attended, norm), strict=True):
            assert torch.equal(found, chain)


def test_what_does_not_fit_is_refused() -> None:
    """Products that do not follow on each other, another dtype, another number of rows."""
    weights = layer_weights()
    compiled = packed(weights)
    with pytest.raises(ValueError, match="no layer of"):
        packed(replace(weights, down=weights.gated))
    with pytest.raises(ValueError, match="is due"):
        compiled.query(numbers(2, HIDDEN, seed=1).float(), None)
    with pytest.raises(ValueError, match="is due"):
        compiled.absorb(numbers(2, HIDDEN, seed=1), numbers(1, HEADS, HEAD_SIZE, seed=2), weights.input_norm)


def test_only_compiled_products_make_a_compiled_layer() -> None:
    """One that could not be packed, or float32, and all are called one after the other."""
    weights = layer_weights()
    operators = CpuOperators(torch.bfloat16)
    assert isinstance(decoder_layer(weights, operators, HEAD_SIZE, EPSILON), PackedLayer)
    plain = projection(numbers(HIDDEN, 33, seed=1), None, Slabs())
    mixed = replace(weights, down=plain)
    assert isinstance(decoder_layer(mixed, operators, HEAD_SIZE, EPSILON), PlainLayer)
