"""The slowest obvious attention port: every key and value in a list, one row at a time, in float32."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from cluster.model_spec import ModelSpec
from workers.dense.model import Decoder


class MemoryAttention:
    """Holds the KV of several sequences and attends by the definition; implements `AttentionPort`."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._rows: list[tuple[int, int]] = []
        self._query: Tensor | None = None
        self._keys: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(spec.layers)]
        self._values: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(spec.layers)]
        self.calls: list[tuple[str, int]] = []
        """What the model called, in order: (name, layer)."""

    def plan(self, rows: Sequence[tuple[int, int]]) -> None:
        """Name the (sequence, position) of each row of the next step."""
        self._rows = list(rows)

    def send_query(self, layer: int, query: Tensor) -> None:
        """Keep the query of this layer."""
        self.calls.append(("query", layer))
        self._query = query

    def send_key_value(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store each row's key and value under its sequence and position."""
        self.calls.append(("key_value", layer))
        for index, row in enumerate(self._rows):
            self._keys[layer][row] = key[index].to(torch.float32)
            self._values[layer][row] = value[index].to(torch.float32)

    def receive(self, layer: int) -> Tensor:
        """Attention of every row over what its window lets it see."""
        self.calls.append(("receive", layer))
        assert self._query is not None, "receive before send_query"
        query, self._query = self._query, None
        outputs = [
            self._attend(layer, row, query[index].to(torch.float32)) for index, row in enumerate(self._rows)
        ]
        return torch.stack(outputs).to(query.dtype)

    def _attend(self, layer: int, row: tuple[int, int], query: Tensor) -> Tensor:
        """[query_heads, head_size] for one row: softmax(q k / sqrt(d)) v, heads grouped."""
        sequence, position = row
        window = self._spec.sliding_windows[layer]
        first = 0 if window is None else max(0, position - window + 1)
        seen = [(sequence, place) for place in range(first, position + 1)]
        group = self._spec.query_heads // self._spec.kv_heads
        keys = torch.stack([self._keys[layer][place] for place in seen], 1).repeat_interleave(group, 0)
        values = torch.stack([self._values[layer][place] for place in seen], 1).repeat_interleave(group, 0)
        scores = torch.einsum("htd,hd->ht", keys, query) * float(self._spec.head_size) ** -0.5
        return torch.einsum("ht,htd->hd", scores.softmax(-1), values)


def finish(step: Generator[None, None, Tensor]) -> Tensor:
    """Run one step of a decoder to its end; its hidden states."""
    while True:
        try:
            next(step)
        except StopIteration as end:
            hidden: Tensor = end.value
            return hidden


def run_step(decoder: Decoder, attention: MemoryAttention, rows: Sequence[tuple[int, int, int]]) -> Tensor:
    """Hidden states of a step over rows of (sequence, position, token id)."""
    attention.plan([(sequence, position) for sequence, position, _ in rows])
    token_ids = torch.tensor([token_id for _, _, token_id in rows], device=decoder.device)
    positions = torch.tensor([position for _, position, _ in rows], device=decoder.device)
    return finish(decoder.forward(token_ids, positions, attention))
