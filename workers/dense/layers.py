"""A decoder's layer without its attention: from what was attended to the next layer's queries."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from workers.dense.operators import RowOperators
from workers.dense.weights import LayerWeights
from workers.kernels.select import has_compiled_code

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the rows' positions: [rows, 1, head size / 2] each."""


class DecoderLayer(Protocol):
    """One layer. hidden, normed: [rows, hidden size]; `tables`: None where the layer does not turn heads."""

    def query(self, normed: Tensor, tables: Tables | None) -> Tensor:
        """[rows, query heads, head size]: normed per head and turned if asked."""
        ...

    def key_value(self, normed: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
        """Keys, as queries are made, and values: [rows, KV heads, head size], whose rows may lie apart."""
        ...

    def absorb(self, hidden: Tensor, attended: Tensor, next_norm: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and MLP with their residuals, also normed for what is next; `hidden` is given up.

        attended: [rows, query heads, head size].
        """
        ...


class PlainLayer:
    """Its products and operators one after the other, whoever computes them."""

    def __init__(
        self, weights: LayerWeights, operators: RowOperators, head_size: int, epsilon: float
    ) -> None:
        self._weights = weights
        self._operators = operators
        self._head_size = head_size
        self._epsilon = epsilon

    def query(self, normed: Tensor, tables: Tables | None) -> Tensor:
        """See `DecoderLayer.query`."""
        query = self._weights.query(normed).view(len(normed), -1, self._head_size)
        return self._turn(query, self._weights.query_norm, tables)

    def key_value(self, normed: Tensor, tables: Tables | None) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.key_value`."""
        both = self._weights.key_value(normed).view(len(normed), 2, -1, self._head_size)
        keys, values = both.unbind(1)
        return self._turn(keys, self._weights.key_norm, tables), values

    def absorb(self, hidden: Tensor, attended: Tensor, next_norm: Tensor) -> tuple[Tensor, Tensor]:
        """See `DecoderLayer.absorb`."""
        weights, epsilon = self._weights, self._epsilon
        update = weights.output(attended.flatten(1))
        hidden, normed = self._operators.add_rms_norm(hidden, update, weights.post_attention_norm, epsilon)
        update = weights.down(weights.gated(normed))
        return self._operators.add_rms_norm(hidden, update, next_norm, epsilon)

    def _turn(self, heads: Tensor, norm: Tensor | None, tables: Tables | None) -> Tensor:
        """[rows, heads, head size]; rows may be strided."""
        if norm is not None:
            heads = self._operators.rms_norm(heads, norm, self._epsilon)
        return heads if tables is None else self._operators.rotate(heads, *tables)


def decoder_layer(
    weights: LayerWeights, operators: RowOperators, head_size: int, epsilon: float
) -> DecoderLayer:
    """In compiled calls of several products each where all of them are compiled, else the plain one."""
    if has_compiled_code():
        from workers.kernels.cpu.decoder_layer import PackedLayer  # only now: they import the extension
        from workers.kernels.cpu.product import PackedProduct

        products = (weights.query, weights.key_value, weights.output, weights.gated, weights.down)
        packed = [product for product in products if isinstance(product, PackedProduct)]
        if len(packed) == len(products):
            head_norms = (weights.query_norm, weights.key_norm)
            return PackedLayer(packed, weights.post_attention_norm, head_norms, head_size, epsilon)
    return PlainLayer(weights, operators, head_size, epsilon)
