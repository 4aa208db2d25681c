"""Weights of a decoder: memory-mapped, loaded once, fused where a step wants them together.

Tensors that are used as they lie in the file (same dtype, CPU) are views into the mapping: the page
cache holds them once, for all processes of the machine. Fused or converted ones are copied tensor by
tensor, each source range being given back at once, so that loading peaks little above the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cluster.model_spec import ModelSpec
from cluster.weight_files import StoredTensor, read_stored_tensors
from cluster.weight_shapes import require_shapes
from workers.dense.operators import RowOperators, select_operators
from workers.dense.weight_mapping import WeightMapping
from workers.kernels.memory import Slabs, reserve
from workers.kernels.select import has_compiled_code

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) after each tensor."""


class Projection(Protocol):
    """y = x weight^T + bias."""

    @property
    def weight(self) -> Tensor:
        """[outputs, inputs]; may be a copy."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[outputs]"""
        ...

    @property
    def inputs(self) -> int:
        """Numbers of a row."""
        ...

    def __call__(self, inputs: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A projection with PyTorch, over the weights as they lie."""

    weight: Tensor
    bias: Tensor | None

    @property
    def inputs(self) -> int:
        """See `Projection`."""
        return self.weight.shape[1]

    def __call__(self, inputs: Tensor) -> Tensor:
        """See `Projection`."""
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


@dataclass(frozen=True, slots=True, eq=False)
class GatedLinear:
    """silu(gate) x up of a projection with PyTorch, whose outputs' first half is the gate."""

    linear: Linear
    operators: RowOperators

    @property
    def weight(self) -> Tensor:
        """See `Projection`."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """See `Projection`."""
        return self.linear.bias

    @property
    def inputs(self) -> int:
        """See `Projection`."""
        return self.linear.inputs

    def __call__(self, inputs: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs / 2], until the thread's next call."""
        return self.operators.silu_mul(self.linear(inputs))


def projection(weight: Tensor, bias: Tensor | None, slabs: Slabs, *, gated: bool = False) -> Projection:
    """The compiled product over packed weights where it is built and takes them, which is bfloat16 on CPUs;
    else PyTorch's, which brings such weights into another order at every call. `gated`: silu of the first
    half of its outputs times the second.
    """
    if weight.dtype is torch.bfloat16 and has_compiled_code():
        from workers.kernels.cpu.product import PackedProduct, packs  # only now: it imports the extension

        if packs(weight):
            return PackedProduct(weight, bias, slabs, gated=gated)
    linear = Linear(weight, bias)
    return GatedLinear(linear, select_operators(weight.dtype, weight.device)) if gated else linear


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer. The query projection stands alone because q leaves before k and v exist."""

    input_norm: Tensor
    query: Projection
    key_value: Projection
    """keys in the first half of the outputs, values in the second"""
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Projection
    post_attention_norm: Tensor
    gated: Projection
    """normed -> silu(gate) x up, half as many numbers as its weight has outputs: the gate's, then up's"""
    down: Projection


@dataclass(frozen=True, slots=True, eq=False)
class DecoderWeights:
    """All weights of one model on one device in one dtype."""

    embedding: Tensor
    """[vocabulary, hidden]"""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Projection
    """hidden -> vocabulary; over the embedding itself where tied and not packed"""

    def projections(self) -> Iterator[Projection]:
        """Every matrix product of a step, in order."""
        for layer in self.layers:
            yield from (layer.query, layer.key_value, layer.output, layer.gated, layer.down)
        yield self.head


def load_weights(
    spec: ModelSpec,
    folder: Path | str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> DecoderWeights:
    """Load a folder's safetensors as `dtype` on `device`.

    Raises `BrokenModelFolder` naming the file or tensor that is missing, truncated or misshapen.
    """
    return _Loader(spec, Path(folder), dtype, device, progress).load()


class _Loader:
    """Takes tensors out of the files one by one and counts their bytes."""

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self._spec = spec
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._slabs = Slabs()
        self._stored = read_stored_tensors(folder)
        require_shapes(folder, spec, self._stored)
        self._mappings = {path: WeightMapping(path) for path in {t.path for t in self._stored.values()}}
        self._bytes_total = sum(tensor.end - tensor.start for tensor in self._stored.values())
        self._bytes_done = 0

    def load(self) -> DecoderWeights:
        """Everything."""
        spec = self._spec
        embedding = self._take("model.embed_tokens.weight")
        # The largest first: to pack a tensor takes room for it twice, which is there before the others come.
        if spec.tied_embeddings:
            head = projection(embedding, None, self._slabs)
        else:
            head = self._linear(["lm_head"], biased=False)
        layers = tuple(self._take_layer(f"model.layers.{layer}") for layer in range(spec.layers))
        final_norm = self._take("model.norm.weight")
        weights = DecoderWeights(embedding, layers, final_norm, head)
        if self._progress is not None:
            self._progress(self._bytes_total, self._bytes_total)
        return weights

    def _take_layer(self, prefix: str) -> LayerWeights:
        biases, has_head_norms = self._spec.biases, self._spec.query_key_norm
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=self._take(f"{prefix}.input_layernorm.weight"),
            query=self._linear([f"{attention}.q_proj"], biases.query_key_value),
            key_value=self._linear([f"{attention}.k_proj", f"{attention}.v_proj"], biases.query_key_value),
            query_norm=self._take(f"{attention}.q_norm.weight") if has_head_norms else None,
            key_norm=self._take(f"{attention}.k_norm.weight") if has_head_norms else None,
            output=self._linear([f"{attention}.o_proj"], biases.output),
            post_attention_norm=self._take(f"{prefix}.post_attention_layernorm.weight"),
            gated=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], biases.mlp, gated=True),
            down=self._linear([f"{mlp}.down_proj"], biases.mlp),
        )

    def _linear(self, names: list[str], biased: bool, *, gated: bool = False) -> Projection:
        """One projection, or several of equal shape fused along their outputs."""
        weight = self._fuse([f"{name}.weight" for name in names])
        bias = self._fuse([f"{name}.bias" for name in names]) if biased else None
        made = projection(weight, bias, self._slabs, gated=gated)
        if not isinstance(made, Linear | GatedLinear):
            for name in names:
                stored = self._stored[f"{name}.weight"]
                self._mappings[stored.path].give_back(stored)
        return made

    def _fuse(self, names: list[str]) -> Tensor:
        """Tensors of equal shape stacked along the first axis; one alone need not be copied."""
        if len(names) == 1:
            return self._take(names[0])
        shape = self._stored[names[0]].shape
        fused = self._room((len(names) * shape[0], *shape[1:]))
        for part, name in zip(fused.chunk(len(names)), names, strict=True):
            self._copy(name, part)
        return fused

    def _take(self, name: str) -> Tensor:
        """One tensor: a view into the mapping if it can be used as it lies, else a copy."""
        stored = self._stored[name]
        view = self._mappings[stored.path].view(stored)
        if view.dtype == self._dtype and self._device.type == "cpu":
            self._mappings[stored.path].read_in(stored)
            self._count(stored)
            return view
        target = self._room(stored.shape)
        self._copy(name, target)
        return target

    def _room(self, shape: Sequence[int]) -> Tensor:
        """A tensor of its own pages: one that is packed afterwards leaves none behind in the heap."""
        size = torch.Size(shape).numel() * self._dtype.itemsize
        return reserve(size, self._device).view(self._dtype).view(shape)

    def _copy(self, name: str, target: Tensor) -> None:
        """Convert one tensor into `target` and give its file pages back."""
        stored = self._stored[name]
        mapping = self._mappings[stored.path]
        target.copy_(mapping.view(stored))
        mapping.give_back(stored)
        self._count(stored)

    def _count(self, stored: StoredTensor) -> None:
        self._bytes_done += stored.end - stored.start
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
