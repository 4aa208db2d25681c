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
from workers.dense.layers import Tables, decoder_layer
from workers.dense.operators import select_operators
from workers.dense.rope import RotaryEmbedding
from workers.dense.weights import DecoderWeights, Progress, Projection, load_weights


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
        self.layers = tuple(
            decoder_layer(layer, self.operators, spec.head_size, spec.rms_epsilon) for layer in weights.layers
        )
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
        weights = self._weights
        hidden, normed, tables = self._begin(token_ids, positions)
        next_norms = [*(layer.input_norm for layer in weights.layers[1:]), weights.final_norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            turns = tables if self.spec.uses_rope[index] else None
            # q leaves before k and v are computed (Lamina, arXiv 2405.01814).
            attention.send_query(index, layer.query(normed, turns))
            attention.send_key_value(index, *layer.key_value(normed, turns))
            yield
            hidden, normed = layer.absorb(hidden, attention.receive(index), next_norm)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] final-normed hidden states -> [n, vocabulary_size] float32."""
        return self._weights.head(hidden).to(torch.float32)

    def projections(self) -> Iterator[Projection]:
        """Every matrix product of a step, in order: what remains of it without attention and all else."""
        return self._weights.projections()

    def _begin(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tables]:
        """Embeddings [rows, hidden], normed for the first layer, and the tables of rope for all layers."""
        assert token_ids.shape == positions.shape, (
            f"{tuple(token_ids.shape)} tokens, {tuple(positions.shape)} positions"
        )
        assert token_ids.ndim == 1, "rows are flat: one entry per token"
        hidden = torch.nn.functional.embedding(token_ids, self._weights.embedding)
        first_norm = self._weights.layers[0].input_norm
        normed = self.operators.rms_norm(hidden, first_norm, self.spec.rms_epsilon)
        return hidden, normed, self._rope.tables(positions)
