"""The yardstick of `anabranch bench long-decode`: what attention was asked, and what it should have answered.

Attention in float64 over a cache that never exists as a whole: contents come chunk by chunk, and the softmax
is kept as a running maximum, sum and weighted values (Milakov and Gimelshein, arXiv 1805.02867). Queries and
keys are taken as they left the model, rotated already: the attention path is checked, not what a model means.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.cli.bench.filling import CHUNK_TOKENS, Contents
from workers.dense.attention_port import AttentionPort
from workers.dense.model import Decoder


@dataclass(frozen=True, slots=True)
class Row:
    """One token's part of a layer. query, out: [query_heads, head_size]; key, value: [kv_heads, ...]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


Rows = dict[tuple[int, int], Row]
"""(layer, position) -> what passed there."""


class RecordingDecoder(Decoder):
    """A decoder that notes what its attention is asked and answers; for one sequence at a time."""

    rows: Rows

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionPort
    ) -> Generator[None, None, Tensor]:
        """As the decoder does; the row of a position computed again replaces the one before."""
        return (yield from super().forward(token_ids, positions, _Recorder(attention, positions, self.rows)))


class _Recorder:
    """An `AttentionPort` around another one."""

    def __init__(self, port: AttentionPort, positions: Tensor, rows: Rows) -> None:
        self._port = port
        self._positions = positions.tolist()
        self._rows = rows
        self._query: Tensor | None = None
        self._fresh: tuple[Tensor, Tensor] | None = None

    def send_query(self, layer: int, query: Tensor) -> None:
        """See `AttentionPort`."""
        self._query = query.clone()
        self._port.send_query(layer, query)

    def send_key_value(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `AttentionPort`."""
        self._fresh = key.clone(), value.clone()
        self._port.send_key_value(layer, key, value)

    def receive(self, layer: int) -> Tensor:
        """See `AttentionPort`."""
        out = self._port.receive(layer)
        assert self._query is not None
        assert self._fresh is not None
        parts = zip(self._positions, self._query, *self._fresh, out.clone(), strict=True)
        self._rows.update({(layer, position): Row(*tensors) for position, *tensors in parts})
        return out


@dataclass(slots=True)
class _Softmax:
    """Softmax-weighted values of some vectors, while their keys pass by. most, total: [kv_heads, vectors];
    weighted: [kv_heads, vectors, head_size]; all float64.
    """

    most: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> _Softmax:
        """Nothing seen yet by `vectors` [kv_heads, vectors, head_size]."""
        nothing = torch.zeros(vectors.shape[:2], dtype=torch.float64)
        return cls(nothing - torch.inf, nothing, torch.zeros_like(vectors))

    def see(self, scores: Tensor, value: Tensor) -> None:
        """scores: [kv_heads, vectors, tokens], -inf where a vector does not see; value: [kv_heads, tokens,
        head_size]. Every vector sees something by the end of the first call.
        """
        most = torch.maximum(self.most, scores.amax(-1))
        old, weights = torch.exp(self.most - most), torch.exp(scores - most[..., None])
        self.most, self.total = most, self.total * old + weights.sum(-1)
        self.weighted = self.weighted * old[..., None] + weights @ value


def expected(rows: Sequence[Row], layer: int, cached: int, contents: Contents) -> Tensor:
    """float64 [rows, query_heads, head_size]: attention of consecutive tokens, the first of them at position
    `cached`, over `contents` before it and over themselves.
    """
    kv_heads, head_size = rows[0].key.shape
    group = rows[0].query.shape[0] // kv_heads
    query = torch.stack([row.query for row in rows]).double().view(len(rows), kv_heads, group, head_size)
    vectors = query.permute(1, 0, 2, 3).reshape(kv_heads, -1, head_size) * head_size**-0.5
    softmax = _Softmax.of(vectors)
    for first in range(0, cached, CHUNK_TOKENS):
        key, value = (
            part.double().transpose(0, 1)
            for part in contents(layer, first, min(first + CHUNK_TOKENS, cached))
        )
        softmax.see(vectors @ key.transpose(1, 2), value)
    key, value = (
        torch.stack([getattr(row, part) for row in rows]).double().transpose(0, 1)
        for part in ("key", "value")
    )
    later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1).repeat_interleave(group, 0)
    softmax.see((vectors @ key.transpose(1, 2)).masked_fill(later, -torch.inf), value)
    out = (softmax.weighted / softmax.total[..., None]).view(kv_heads, len(rows), group, head_size)
    return out.transpose(0, 1).reshape(len(rows), -1, head_size)


def errors(
    rows: Mapping[tuple[int, int], Row],
    layers: int,
    cached: int,
    contents: Contents,
    say: Callable[[str], object],
) -> list[float]:
    """||out - expected|| / ||expected|| of every row, layer and query head."""
    found: list[float] = []
    for layer in range(layers):
        say(f"checking layer {layer + 1} of {layers} in float64")
        own = [rows[at] for at in sorted(rows) if at[0] == layer]
        wanted = expected(own, layer, cached, contents)
        out = torch.stack([row.out for row in own]).double()
        found += ((out - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten().tolist()
    return found
