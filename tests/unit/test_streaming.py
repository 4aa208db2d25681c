"""The yardstick of long decodes: streamed softmax is softmax, and a wrong cache is noticed."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.cli.bench.long_decode import ERROR_BOUND, Generated
from anabranch.cli.bench.streaming import Row, errors, expected
from cluster.types import KvGeometry

GEOMETRY = KvGeometry(
    layers=2, query_heads=4, kv_heads=2, head_size=16, dtype="float32", block_tokens=16, digest="test"
)
CACHED = 2500
"""Two chunks and a part of one."""


def rows(count: int) -> list[Row]:
    """What a model might send; the outputs are empty."""
    generator = torch.Generator().manual_seed(1)

    def drawn(heads: int) -> Tensor:
        return torch.randn(heads, GEOMETRY.head_size, generator=generator)

    return [Row(drawn(4), drawn(2), drawn(2), torch.zeros(4, 16)) for _ in range(count)]


def plain(asked: list[Row], layer: int) -> Tensor:
    """float64 [rows, query_heads, head_size]: all scores at once, row by row."""
    pieces = [
        Generated(GEOMETRY)(layer, first, min(first + 1024, CACHED)) for first in range(0, CACHED, 1024)
    ]
    outs = []
    for index, row in enumerate(asked):
        key = torch.cat([*(key for key, _ in pieces), *(each.key[None] for each in asked[: index + 1])])
        value = torch.cat(
            [*(value for _, value in pieces), *(each.value[None] for each in asked[: index + 1])]
        )
        key, value = (part.double().repeat_interleave(2, 1) for part in (key, value))
        scores = torch.einsum("hd,thd->ht", row.query.double(), key) / 4
        outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value))
    return torch.stack(outs)


def answered(asked: list[Row], layer: int, outs: Tensor) -> dict[tuple[int, int], Row]:
    """The rows with these outputs, as a recording has them."""
    pairs = zip(asked, outs, strict=True)
    return {
        (layer, CACHED + index): Row(row.query, row.key, row.value, out)
        for index, (row, out) in enumerate(pairs)
    }


def test_a_streamed_softmax_is_the_softmax() -> None:
    """Chunk by chunk, and the fresh tokens causally behind them: the same as all scores at once."""
    asked = rows(3)
    torch.testing.assert_close(expected(asked, 1, CACHED, Generated(GEOMETRY)), plain(asked, 1))


def test_a_chunk_of_other_contents_is_noticed() -> None:
    """Right outputs pass; they do not where one chunk of the cache held what belongs to another layer."""
    asked, contents = rows(2), Generated(GEOMETRY)

    def exchanged(layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        return contents(1 - layer if first == 1024 else layer, first, end)

    right = answered(asked, 0, plain(asked, 0)) | answered(asked, 1, plain(asked, 1))
    assert max(errors(right, 2, CACHED, contents, str)) < 1e-9
    assert max(errors(right, 2, CACHED, exchanged, str)) > max(ERROR_BOUND.values())
