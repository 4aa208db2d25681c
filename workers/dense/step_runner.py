"""One step of the model over a plan's chunks: dense layers here, attention over lanes, then the sampler."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import monotonic

from torch import Tensor

from cluster.errors import Internal
from workers.dense.lane_set import LaneSet
from workers.dense.model import Decoder
from workers.dense.remote_attention import StepAttention
from workers.dense.sampler import Sampled, Sampler
from workers.dense.step_layout import Chunk, lay_out, workers_of
from workers.kernels.signature import Kernel


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step brought: a token, or why there is none, for each chunk that samples; and its seconds."""

    chunks: tuple[Chunk, ...]
    sampled: tuple[tuple[Chunk, Sampled | Internal], ...]
    dense_s: float
    attention_s: float
    lane_s: float


class StepRunner:
    """Holds the model, the kernel for chunks over themselves, and the lanes; no state between steps."""

    def __init__(self, decoder: Decoder, kernel: Kernel, lanes: LaneSet) -> None:
        self._decoder = decoder
        self._kernel = kernel
        self._lanes = lanes
        self._sampler = Sampler(decoder.spec.vocabulary_size, decoder.spec.eos_token_ids)

    def run(self, step: int, chunks: Sequence[Chunk]) -> StepOutcome:
        """Compute a step. Raises StepAborted; then none of it counts, and it may simply be repeated."""
        began_s = monotonic()
        spec, device = self._decoder.spec, self._decoder.device
        order = self._lanes.in_sending_order(workers_of(chunks))
        layout = lay_out(chunks, spec.sliding_windows, order, device)
        attention = StepAttention(spec, layout, self._lanes, self._kernel, step, micro_batch=0)
        forward = self._decoder.forward(layout.token_ids(device), layout.positions(device), attention)
        (hidden,) = drive([forward])
        sampling = [chunk for chunk in chunks if chunk.samples]
        results: list[Sampled | Internal] = []
        if sampling:
            logits = self._decoder.logits(hidden[layout.last_rows(sampling, device)])
            results = self._sampler.sample(logits, [chunk.sequence.sample_row() for chunk in sampling])
        times = attention.times
        return StepOutcome(
            layout.chunks,
            tuple(zip(sampling, results, strict=True)),
            dense_s=monotonic() - began_s - times.waited_s,
            attention_s=times.attention_s,
            lane_s=times.lane_s,
        )


def drive(forwards: Sequence[Generator[None, None, Tensor]]) -> list[Tensor]:
    """Run the forward passes of micro-batches to their ends, each in turn while the others wait for
    attention; their hidden states.
    """
    hidden: dict[int, Tensor] = {}
    while len(hidden) < len(forwards):
        for index, forward in enumerate(forwards):
            if index in hidden:
                continue
            try:
                next(forward)
            except StopIteration as end:
                hidden[index] = end.value
    return [hidden[index] for index in range(len(forwards))]
