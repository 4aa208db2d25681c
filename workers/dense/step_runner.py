"""One step of the model over a plan's chunks: dense layers here, attention over lanes, then the sampler."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import TypeVar

import torch
from torch import Tensor

from cluster.errors import Internal
from cluster.policies.micro_batches import MicroBatches, work_of
from workers.dense.attention_port import AttentionPort
from workers.dense.emulated_attention import DensePace, EmulatedAttention
from workers.dense.lane_set import LaneSet
from workers.dense.model import Decoder
from workers.dense.operators import select_operators
from workers.dense.remote_attention import AttentionTimes, StepAttention
from workers.dense.sampler import Sampled, Sampler, SampleRow
from workers.dense.step_layout import Chunk, StepLayout, lay_out, offset_anew, workers_of
from workers.kernels.signature import Kernel

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where a step's seconds went; each side's three add up to `wall_s`, as far as clocks agree.

    Dense: computing, waiting with no micro-batch that could go on, handing messages over. Attention:
    computing (the slowest worker of each layer), idle, and `lane_s`: moving bytes, waking up on either side.
    `head_s`, of the dense side's: what followed the last layer, head and sampler.
    """

    wall_s: float
    head_s: float
    waited_s: float
    sent_s: float
    attention_s: float
    lane_s: float

    @property
    def dense_s(self) -> float:
        """The dense side computed."""
        return max(0.0, self.wall_s - self.waited_s - self.sent_s)

    @property
    def attention_idle_s(self) -> float:
        """The attention side had nothing to do."""
        return max(0.0, self.wall_s - self.attention_s - self.lane_s)

    @property
    def hidden_share(self) -> float:
        """Share of attention and lanes that dense work covered: 1 - waiting / (attention + lanes)."""
        elsewhere_s = self.attention_s + self.lane_s
        return max(0.0, 1 - self.waited_s / elsewhere_s) if elsewhere_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a step brought: a token, or why there is none, for each chunk that samples; and its seconds."""

    chunks: tuple[Chunk, ...]
    sampled: tuple[tuple[Chunk, Sampled | Internal], ...]
    micro_batches: int
    times: StepTimes


class StepRunner:
    """Holds the model, the kernel for chunks over themselves, the lanes, and who is in which micro-batch."""

    def __init__(
        self,
        decoder: Decoder,
        kernel: Kernel,
        lanes: LaneSet,
        micro_batches: MicroBatches,
        pace: DensePace | None = None,
    ) -> None:
        """`pace`: of the device that is emulated, if one is."""
        self.pace = pace
        self._decoder = decoder
        self._kernel = kernel
        self._lanes = lanes
        self._micro_batches = micro_batches
        spec, over_logits = decoder.spec, select_operators(torch.float32, decoder.device)
        self._sampler = Sampler(spec.vocabulary_size, spec.eos_token_ids, over_logits)

    @torch.inference_mode()
    def run(self, step: int, chunks: Sequence[Chunk]) -> StepOutcome:
        """Compute a step. Raises StepAborted; then none of it counts, and it may simply be repeated. Raises
        StepUnsendable.
        """
        began_s = monotonic()
        if self.pace is not None:
            self.pace.begin_step()
        remote = not all(map(self._lanes.is_local, workers_of(chunks)))
        halves = self._micro_batches.split(chunks, remote=remote)
        if len(halves) > 1:
            halves = [offset_anew(half) for half in halves]
        passes = [_Pass(self, step, index, half) for index, half in enumerate(halves)]
        hidden, busy_s = drive([one.run() for one in passes])
        sampling = [chunk for one in passes for chunk in one.sampling]
        layered_s = monotonic()
        results = self._sample(hidden, [chunk.sequence.sample_row() for chunk in sampling])
        head_s = monotonic() - layered_s
        if remote:
            for one, seconds in zip(passes, busy_s, strict=True):
                one.tell(self._micro_batches, seconds + head_s / len(passes))
        return StepOutcome(
            tuple(chunks),
            tuple(zip(sampling, results, strict=True)),
            len(passes),
            _times(monotonic() - began_s, head_s, [one.times for one in passes]),
        )

    def rest(self) -> None:
        """There is no step to run."""
        if self.pace is not None:
            self.pace.rest()

    def tell(self) -> None:
        """Log how well an emulated device's time was kept."""
        if self.pace is not None:
            self.pace.padding.tell("dense")

    def lay_out(self, chunks: Sequence[Chunk]) -> StepLayout:
        """Who attends which rows of one micro-batch."""
        order = self._lanes.in_sending_order(workers_of(chunks))
        return lay_out(chunks, self._decoder.spec.sliding_windows, order, self._decoder.device)

    def attention(self, layout: StepLayout, step: int, micro_batch: int) -> StepAttention | EmulatedAttention:
        """The attention of one micro-batch."""
        attention = StepAttention(
            self._decoder.spec, layout, self._lanes, self._kernel, self._decoder.operators, step, micro_batch
        )
        return attention if self.pace is None else EmulatedAttention(attention, self.pace, layout.chunk_sizes)

    def forward(
        self, layout: StepLayout, attention: AttentionPort, sampling: Sequence[Chunk]
    ) -> Generator[None, None, Tensor]:
        """The layers: hidden states of the rows that sample, [sampling, hidden]."""
        device = self._decoder.device
        hidden = yield from self._decoder.forward(
            layout.token_ids(device), layout.positions(device), attention
        )
        return hidden[layout.last_rows(sampling, device)]

    def _sample(self, hidden: Sequence[Tensor], rows: Sequence[SampleRow]) -> list[Sampled | Internal]:
        """Head and sampler over all micro-batches at once: the head's weights, the step's largest, are read
        once.
        """
        if not rows:
            return []
        return self._sampler.sample(
            self._decoder.logits(hidden[0] if len(hidden) == 1 else torch.cat(list(hidden))), rows
        )


class _Pass:
    """One micro-batch on its way through the layers."""

    def __init__(self, runner: StepRunner, step: int, micro_batch: int, chunks: Sequence[Chunk]) -> None:
        self.sampling = [chunk for chunk in chunks if chunk.samples]
        self._runner = runner
        self._work = work_of(chunks)
        self._layout = runner.lay_out(chunks)
        self._attention = runner.attention(self._layout, step, micro_batch)

    def run(self) -> Generator[None, None, Tensor]:
        """Through all layers: hidden states [sampling, hidden]."""
        return self._runner.forward(self._layout, self._attention, self.sampling)

    @property
    def times(self) -> AttentionTimes:
        """What it waited and sent so far."""
        return self._attention.times

    def tell(self, micro_batches: MicroBatches, busy_s: float) -> None:
        """What it took, for the choice of the next steps."""
        times = self.times
        dense_s = max(0.0, busy_s - times.waited_s - times.sent_s)
        micro_batches.note(self._work, dense_s, times.attention_s, times.lane_s)


def _times(wall_s: float, head_s: float, passes: Sequence[AttentionTimes]) -> StepTimes:
    return StepTimes(
        wall_s,
        head_s,
        sum(times.waited_s for times in passes),
        sum(times.sent_s for times in passes),
        sum(times.attention_s for times in passes),
        sum(times.lane_s for times in passes),
    )


def drive(forwards: Sequence[Generator[None, None, _T]]) -> tuple[list[_T], list[float]]:
    """Run the forward passes of micro-batches to their ends, each in turn while the others wait for
    attention; what they return, and the seconds each was run for.

    Strictly in turn: workers serve a lane's messages in order, so replies come in the order of the turns.
    """
    returned: dict[int, _T] = {}
    seconds = [0.0] * len(forwards)
    while len(returned) < len(forwards):
        for index, forward in enumerate(forwards):
            if index in returned:
                continue
            began_s = monotonic()
            try:
                next(forward)
            except StopIteration as end:
                returned[index] = end.value
            seconds[index] += monotonic() - began_s
    return [returned[index] for index in range(len(forwards))], seconds
