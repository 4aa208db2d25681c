"""A model whose next token is a checksum of every key and value it may see, and the same by definition.

Queries are zero, so attention is the mean of the values in sight; times their number it is their sum, exact
after rounding. One wrong, stale or missing value anywhere gives another token.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from cluster.model_spec import Biases, ModelSpec
from cluster.rope_spec import RopeSpec
from workers.dense.attention_port import AttentionPort
from workers.dense.operators import select_operators

VOCABULARY = 97
LAYERS = 2
SIZE = 4
_MASK = (1 << 61) - 1


def spec_of(window: int | None = None) -> ModelSpec:
    """Its shape; with a window in every layer, or with none."""
    return ModelSpec(
        architecture="Sums",
        layers=LAYERS,
        hidden_size=SIZE,
        query_heads=1,
        kv_heads=1,
        head_size=SIZE,
        intermediate_size=SIZE,
        vocabulary_size=VOCABULARY,
        rms_epsilon=1e-6,
        tied_embeddings=True,
        biases=Biases(),
        query_key_norm=False,
        sliding_windows=(window,) * LAYERS,
        uses_rope=(False,) * LAYERS,
        rope=RopeSpec(),
        context_length=1024,
        eos_token_ids=(),
        bos_token_id=None,
        stored_dtype="float32",
    )


def trace(token_id: int, position: int, layer: int) -> tuple[int, ...]:
    """What a token leaves in a layer's cache: small numbers, so that sums of a thousand are exact."""
    mixed = (token_id * 1_000_003 + position * 7_919 + layer * 104_729 + 12_345) * 2_654_435_761
    return tuple((mixed >> (8 + 7 * index)) & 127 for index in range(SIZE))


def token_of(sums: Sequence[int]) -> int:
    """The token that follows these sums over all layers."""
    mixed = 0
    for each in sums:
        mixed = (mixed * 1_000_003 + each) & _MASK
    return (mixed * 0x9E3779B97F4A7C15 >> 20) % VOCABULARY


def continuation(prompt: Sequence[int], count: int, window: int | None = None) -> list[int]:
    """What the model says after a prompt, by definition."""
    token_ids = list(prompt)
    sums = [0] * (LAYERS * SIZE)
    for position in range(len(prompt) + count - 1):
        _add(sums, token_ids, position, 1)
        if window is not None and position >= window:
            _add(sums, token_ids, position - window, -1)
        if position >= len(prompt) - 1:
            token_ids.append(token_of(sums))
    return token_ids[len(prompt) :]


def _add(sums: list[int], token_ids: Sequence[int], position: int, sign: int) -> None:
    for layer in range(LAYERS):
        for index, part in enumerate(trace(token_ids[position], position, layer)):
            sums[layer * SIZE + index] += sign * part


class SumDecoder:
    """What an engine uses of a `Decoder`."""

    def __init__(self, window: int | None = None) -> None:
        self.spec = spec_of(window)
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.operators = select_operators(self.dtype, self.device)
        self._window = window

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionPort
    ) -> Generator[None, None, Tensor]:
        """See `Decoder.forward`. Returns the sums, [rows, layers x size]."""
        rows = list(zip(token_ids.tolist(), positions.tolist(), strict=True))
        seen = positions + 1 if self._window is None else (positions + 1).clamp(max=self._window)
        sums = []
        for layer in range(LAYERS):
            values = torch.tensor([trace(*row, layer) for row in rows], dtype=torch.float32)
            attention.send_query(layer, torch.zeros(len(rows), 1, SIZE))
            attention.send_key_value(layer, values[:, None].clone(), values[:, None])
            yield
            sums.append((attention.receive(layer)[:, 0] * seen[:, None]).round())
        return torch.cat(sums, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, sums] -> [n, vocabulary]: one for the token that follows, zero for all others."""
        logits = torch.zeros(hidden.shape[0], VOCABULARY)
        for row, sums in enumerate(hidden.to(torch.int64).tolist()):
            logits[row, token_of(sums)] = 1.0
        return logits
