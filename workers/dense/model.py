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
from workers.dense.rope import RotaryEmbedding, rotate
from workers.dense.weights import DecoderWeights, LayerWeights, Linear, Progress, load_weights


class Decoder:
    """One model on one device; holds weights and no state of any sequence.

    Each stage enters inference mode by itself rather than around the generator: micro-batches
    interleave, and a mode entered across a `yield` would leak into whoever runs in between.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self._weights = weights
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
        hidden, cos, sin = self._begin(token_ids, positions)
        for index, layer in enumerate(self._weights.layers):
            tables = (cos, sin) if self.spec.uses_rope[index] else None
            self._send(index, layer, hidden, tables, attention)
            yield
            hidden = self._absorb(layer, hidden, attention.receive(index))
        with torch.inference_mode():
            return self._norm(hidden, self._weights.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] final-normed hidden states -> [n, vocabulary_size] float32."""
        with torch.inference_mode():
            return self._weights.head(hidden).to(torch.float32)

    def projections(self) -> Iterator[Linear]:
        """Every matrix product of a step, in order: what remains of it without attention and all else."""
        for layer in self._weights.layers:
            yield from (layer.query, layer.key_value, layer.output, layer.gate_up, layer.down)
        yield self._weights.head

    def _begin(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [rows, hidden] and the tables of rope, one set for all layers."""
        assert token_ids.shape == positions.shape, (
            f"{tuple(token_ids.shape)} tokens, {tuple(positions.shape)} positions"
        )
        assert token_ids.ndim == 1, "rows are flat: one entry per token"
        with torch.inference_mode():
            cos, sin = self._rope.tables(positions)
            return torch.nn.functional.embedding(token_ids, self._weights.embedding), cos, sin

    def _send(
        self,
        index: int,
        layer: LayerWeights,
        hidden: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attention: AttentionPort,
    ) -> None:
        """Norm and projections; q leaves before k and v are computed (Lamina, arXiv 2405.01814)."""
        with torch.inference_mode():
            normed = self._norm(hidden, layer.input_norm)
            query = self._heads(layer.query(normed), layer.query_norm, tables)
            attention.send_query(index, query)
            keys, values = layer.key_value(normed).chunk(2, dim=-1)
            key = self._heads(keys, layer.key_norm, tables)
            attention.send_key_value(index, key, self._split(values))

    def _heads(self, projected: Tensor, norm: Tensor | None, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """[rows, heads x head_size] -> [rows, heads, head_size], normed per head and rotated if asked."""
        heads = self._split(projected)
        if norm is not None:
            heads = self._norm(heads, norm)
        return heads if tables is None else rotate(heads, *tables)

    def _split(self, projected: Tensor) -> Tensor:
        """[rows, heads x head_size] seen as [rows, heads, head_size]; rows may be strided."""
        return projected.view(projected.shape[0], -1, self.spec.head_size)

    def _absorb(self, layer: LayerWeights, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP with their residuals: [rows, hidden] of the next layer."""
        with torch.inference_mode():
            hidden = hidden + layer.output(attended.flatten(1))
            normed = self._norm(hidden, layer.post_attention_norm)
            gate, up = layer.gate_up(normed).chunk(2, dim=-1)
            return hidden + layer.down(torch.nn.functional.silu(gate) * up)

    def _norm(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last axis: computed in float32, rounded, then weighted in model dtype."""
        wide = inputs.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.rms_epsilon)
        return weight * (wide * scale).to(self.dtype)
