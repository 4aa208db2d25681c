"""The dense half of a decoder: everything but attention, for all supported architectures.

Llama, Mistral, Qwen2, Qwen3 and SmolLM3 are one algorithm with options that `ModelSpec` states:
biases, normed queries and keys, layers without rope, sliding windows (which only attention sees).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cluster.model_spec import ModelSpec
from workers.dense.attention_port import AttentionPort
from workers.dense.operators import select_operators
from workers.dense.rope import RotaryEmbedding
from workers.dense.weights import DecoderWeights, LayerWeights, Progress, Projection, load_weights


class Decoder:
    """One model on one device; holds weights and no state of any sequence.

    Nothing here enters inference mode: micro-batches interleave, and a mode entered across a `yield` would
    leak into whoever runs in between. Whoever runs the passes enters it once for all of them.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self._weights = weights
        self.operators = select_operators(self.dtype, self.device)
        self._rope = RotaryEmbedding(spec.rope, spec.head_size, self.dtype, self.device)

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        progress: Progress | None = None,
    ) -> Decoder:
        """Load a Hugging Face folder; raises `UnsupportedModel` or `BrokenModelFolder`."""
        spec = ModelSpec.from_folder(folder)
        return cls(spec, load_weights(spec, folder, dtype, device or torch.device("cpu"), progress))

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionPort
    ) -> Generator[None, None, Tensor]:
        """One step over rows of any mix of sequences; the rows' hidden states are its return value.

        `token_ids` and `positions` are int64 [rows] on this device. Yields once per layer, after the
        layer's query, key and value have left and before their answer is awaited: run another
        micro-batch there. Returns the final-normed hidden states [rows, hidden_size].
        """
        layers = self._weights.layers
        hidden, normed, tables = self._begin(token_ids, positions)
        next_norms = [*(layer.input_norm for layer in layers[1:]), self._weights.final_norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            self._send(index, layer, normed, tables if self.spec.uses_rope[index] else None, attention)
            yield
            hidden, normed = self._absorb(layer, hidden, attention.receive(index), next_norm)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] final-normed hidden states -> [n, vocabulary_size] float32."""
        return self._weights.head(hidden).to(torch.float32)

    def projections(self) -> Iterator[Projection]:
        """Every matrix product of a step, in order: what remains of it without attention and all else."""
        return self._weights.projections()

    def _begin(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Embeddings [rows, hidden], normed for the first layer, and the tables of rope for all layers."""
        assert token_ids.shape == positions.shape, (
            f"{tuple(token_ids.shape)} tokens, {tuple(positions.shape)} positions"
        )
        assert token_ids.ndim == 1, "rows are flat: one entry per token"
        hidden = torch.nn.functional.embedding(token_ids, self._weights.embedding)
        normed = self._norm(hidden, self._weights.layers[0].input_norm)
        return hidden, normed, self._rope.tables(positions)

    def _send(
        self,
        index: int,
        layer: LayerWeights,
        normed: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attention: AttentionPort,
    ) -> None:
        """Projections; q leaves before k and v are computed (Lamina, arXiv 2405.01814)."""
        rows, head_size = normed.shape[0], self.spec.head_size
        query = layer.query(normed).view(rows, -1, head_size)
        attention.send_query(index, self._turn(query, layer.query_norm, tables))
        keys, values = layer.key_value(normed).view(rows, 2, -1, head_size).unbind(1)
        attention.send_key_value(index, self._turn(keys, layer.key_norm, tables), values)

    def _turn(self, heads: Tensor, norm: Tensor | None, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """[rows, heads, head_size], normed per head and rotated if asked; rows may be strided."""
        if norm is not None:
            heads = self._norm(heads, norm)
        return heads if tables is None else self.operators.rotate(heads, *tables)

    def _absorb(
        self, layer: LayerWeights, hidden: Tensor, attended: Tensor, next_norm: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output projection and MLP with their residuals: [rows, hidden], also normed for what is next."""
        hidden, normed = self._add_norm(hidden, layer.output(attended.flatten(1)), layer.post_attention_norm)
        return self._add_norm(hidden, layer.down(layer.gated(normed)), next_norm)

    def _norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self.operators.rms_norm(rows, weight, self.spec.rms_epsilon)

    def _add_norm(self, hidden: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.operators.add_rms_norm(hidden, update, weight, self.spec.rms_epsilon)
