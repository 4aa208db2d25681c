"""SmolLM2 through whole clusters: free-running tokens, and log-probabilities at every position."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from cluster.config_values import Serves
from tests.cluster_harness import DenseCluster, Output, Shape, request, wait_until
from tests.models import NEAR_TIE
from tests.oracle.matrix import LOGPROB_TOLERANCE, Tally, compare
from tests.oracle.smollm2_references import GENERATED_TOKENS, Reference, Scores, prompts, reference
from tests.smollm2 import smollm2_folder
from workers.dense.attention_port import AttentionPort
from workers.dense.engine import Engine
from workers.dense.model import Decoder
from workers.kernels.select import select

_WAIT_S = 1800.0
"""A prompt of 3,000 tokens among sixteen others, on one busy core, takes minutes."""

_teachers = itertools.count()

_BASE = Shape(step_tokens=256, worker_blocks=480)
SHAPES = {
    "monolithic": replace(_BASE, local_blocks=480),
    "1 worker": replace(_BASE, attention_workers=1, shard_tokens=4096, block_tokens=32),
    "2 workers": replace(_BASE, attention_workers=2, shard_tokens=40, block_tokens=8, worker_blocks=600),
    "local arena and 2 workers": replace(_BASE, local_blocks=14, attention_workers=2, shard_tokens=48),
    "5 workers": replace(_BASE, attention_workers=5, shard_tokens=13, block_tokens=7, worker_blocks=400),
}
"""Sequences of 65 to 3,063 tokens; shards of unequal sizes, more than one per worker in long sequences."""


class ObservedDecoder(Decoder):
    """A decoder that keeps the final hidden state of every row; for one sequence at a time."""

    hidden_at: dict[int, Tensor]

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionPort
    ) -> Generator[None, None, Tensor]:
        """As the decoder does; the row of a position computed again replaces the one before."""
        hidden = yield from super().forward(token_ids, positions, attention)
        self.hidden_at.update(zip(positions.tolist(), hidden, strict=True))
        return hidden


@cache
def observed_decoder() -> ObservedDecoder:
    """SmolLM2 in float32, loaded once."""
    decoder = ObservedDecoder.from_folder(smollm2_folder())
    assert isinstance(decoder, ObservedDecoder)
    decoder.hidden_at = {}
    return decoder


class ObservedCluster(DenseCluster):
    """A cluster whose engine runs an `ObservedDecoder`, for minutes if need be."""

    def __enter__(self) -> ObservedCluster:
        super().__enter__()
        return self

    def new_engine(self, serves: Serves = "both") -> Engine:
        """An engine over the observed decoder."""
        return Engine(self.config, observed_decoder(), select("auto", "cpu"), self.connect, serves=serves)

    def run(self, given: Sequence[Sequence[int]], max_tokens: int, tenant: str = "tenant") -> list[Output]:
        """Greedy outputs of prompts submitted together, with log-probabilities."""
        requests = [request(prompt, max_tokens, logprobs=0, deadline_s=_WAIT_S) for prompt in given]
        submissions = [self.submit(replace(each, tenant=tenant)) for each in requests]
        wait_until(lambda: all(self.listener.output(each).is_over for each in submissions), _WAIT_S)
        return [self.listener.output(each) for each in submissions]

    def teacher_forced(self, token_ids: Sequence[int]) -> Tensor:
        """[tokens, hidden size]: the final hidden state after each token of a given text.

        A tenant of its own shares no blocks with anybody, so that every position is computed.
        """
        hidden_at = observed_decoder().hidden_at
        hidden_at.clear()
        (output,) = self.run([token_ids], 1, tenant=f"teacher-{next(_teachers)}")
        assert output.failure is None, str(output.failure)
        return torch.stack([hidden_at[position] for position in range(len(token_ids))])


def free_running(shape_name: str, prompt_indices: Sequence[int]) -> Tally:
    """All prompts as one batch: tokens, and their log-probabilities, up to the first near-tie."""
    shape = SHAPES[shape_name]
    references = [reference(prompts()[index]) for index in prompt_indices]
    with ObservedCluster(smollm2_folder(), shape) as cluster:
        outputs = cluster.run([each.prompt for each in references], GENERATED_TOKENS)
    tally = Tally()
    for index, output, each in zip(prompt_indices, outputs, references, strict=True):
        tally.add(compare(f"prompt {index} over {shape_name}", output, each.expected()))
    most = max((output.maps[-1] for output in outputs if output.maps), key=len, default=())
    used = {shard.worker for shard in most}
    tally.demand(
        len(used) == shape.attention_workers + (shape.local_blocks > 0), f"{shape_name}: only {used} used"
    )
    return tally


def teacher_forced(shape_name: str, prompt_indices: Sequence[int]) -> Tally:
    """Prompt and reference tokens given: at every position the best token and the log-probabilities agree."""
    tally = Tally()
    with ObservedCluster(smollm2_folder(), SHAPES[shape_name]) as cluster:
        for index in prompt_indices:
            each = reference(prompts()[index])
            hidden = cluster.teacher_forced(each.inputs)
            tally.add(compare_scores(f"prompt {index} over {shape_name}", hidden, each))
            cluster.wait_all_free()
    return tally


def compare_scores(name: str, hidden: Tensor, expected: Reference) -> Tally:
    """Account for the hidden states [rows, hidden size] of a text against the reference's scores.

    Best tokens against transformers in float32, log-probabilities against it in float64.
    """
    ours = Scores.of(hidden, observed_decoder().logits, expected.scores.best)
    theirs = expected.scores
    sharp = theirs.gaps >= NEAR_TIE
    tally = Tally(1, len(sharp), int(sharp.sum()), expected.near_ties())
    wrong = (sharp & (ours.best != theirs.best)).nonzero()[:, 0].tolist()
    tally.demand(not wrong, f"{name}: other best tokens at positions {wrong[:10]}")
    differences = ours.differences(expected.exact)
    tally.differ(float(differences.max()))
    tally.note_reference(expected.largest_difference())
    far = (~(differences <= LOGPROB_TOLERANCE)).nonzero()[:, 0].tolist()
    tally.demand(not far, f"{name}: log-probabilities too far at positions {far[:10]}")
    return tally
