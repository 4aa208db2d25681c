"""Random tiny models through whole clusters: architectures, batches, preemption, sampling, transports."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cluster.types import SequenceKey
from tests.cluster_harness import DenseCluster, Output, Shape, request
from tests.models import Reference, random_prompt, reference_logits, reference_tokens, tiny_model
from tests.oracle.matrix import Expected, Tally, compare, covering
from tests.oracle.test_model import CASES
from workers.dense.sequences import Submission

GENERATED_TOKENS = 64
ARCHITECTURE_PROMPTS = [random_prompt(length, seed) for seed, length in enumerate((97, 1, 33))]
BATCH_LENGTHS = (70, 1, 33, 5, 64, 17, 100, 2, 48, 9, 31, 3, 55, 12, 40, 7)
BATCH_PROMPTS = [random_prompt(length, 100 + seed) for seed, length in enumerate(BATCH_LENGTHS)]
BATCHES = (1, 3, 8, 16)

SHARDINGS: dict[str, Shape] = {
    "monolithic": Shape(local_blocks=700),
    "1 worker": Shape(attention_workers=1, worker_blocks=700),
    "2 workers": Shape(attention_workers=2, worker_blocks=700, shard_tokens=60),
    "local arena and 2 workers": Shape(
        attention_workers=2, local_blocks=3, worker_blocks=700, shard_tokens=50
    ),
    "5 workers": Shape(attention_workers=5, worker_blocks=700, shard_tokens=20),
}
STEP_TOKENS = (1, 7, 64, 256)
BLOCK_TOKENS = (1, 7, 16, 32)

SMALL_ARENAS = {
    "monolithic": Shape(local_blocks=12),
    "3 workers": Shape(attention_workers=3, worker_blocks=5),
    "5 workers": Shape(attention_workers=5, worker_blocks=3, block_tokens=16, shard_tokens=16),
}
"""Arenas that hold the longest sequence, and hardly more: batches preempt each other all the time."""

SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top p": {"temperature": 0.8, "top_p": 0.9},
    "top k, min p": {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.4},
}


@dataclass
class TinyModel:
    """A model in a temporary folder, and what transformers says after each of some prompts."""

    folder: Path
    references: list[Expected]


@cache
def model_of(name: str) -> TinyModel:
    """One of `CASES` with references for the architectures' prompts; the folder lasts as the process."""
    case = CASES[name]
    folder = tiny_model(_folder(), case.architecture, case.rope, tied=case.tied, **case.overrides)
    return TinyModel(folder, _references(folder, ARCHITECTURE_PROMPTS))


@cache
def batch_model() -> TinyModel:
    """A Llama with references for the batches' prompts."""
    folder = tiny_model(_folder(), "llama")
    return TinyModel(folder, _references(folder, BATCH_PROMPTS))


def architecture_rows() -> dict[str, list[tuple[str, int, int]]]:
    """Model -> (sharding, step tokens, block tokens): every pair of values of the four meets."""
    names, shardings = list(CASES), list(SHARDINGS)
    rows: dict[str, list[tuple[str, int, int]]] = {name: [] for name in names}
    for case, sharding, step, block in covering(names, shardings, STEP_TOKENS, BLOCK_TOKENS):
        rows[names[case]].append((shardings[sharding], STEP_TOKENS[step], BLOCK_TOKENS[block]))
    return rows


def architecture(name: str) -> Tally:
    """One model over its rows of the covering: three prompts at once each time."""
    tally, model = Tally(), model_of(name)
    for sharding, step_tokens, block_tokens in architecture_rows()[name]:
        shape = _scaled(SHARDINGS[sharding], step_tokens, block_tokens)
        title = f"{name}, {sharding}, steps of {step_tokens}, blocks of {block_tokens}"
        with DenseCluster(model.folder, shape) as cluster:
            outputs = cluster.generate(_greedy(prompt) for prompt in ARCHITECTURE_PROMPTS)
        tally.add(_compare_all(title, outputs, model.references))
        used = {shard.worker for output in outputs for shard in output.maps[-1]}
        workers = shape.attention_workers + (shape.local_blocks > 0)
        tally.demand(len(used) == workers, f"{title}: used {sorted(used)}")
    return tally


def batches(arena: str) -> Tally:
    """Mixed batches of 1 to 16 in arenas so small that sequences are preempted and recomputed."""
    tally, model, preemptions = Tally(), batch_model(), 0
    for size in BATCHES:
        with DenseCluster(model.folder, SMALL_ARENAS[arena]) as cluster:
            outputs = cluster.generate(_greedy(prompt) for prompt in BATCH_PROMPTS[:size])
        tally.add(_compare_all(f"batch of {size}, {arena}", outputs, model.references))
        preemptions += sum(output.timings.preemptions for output in outputs if output.timings)
    tally.demand(preemptions >= len(BATCHES), f"{arena}: only {preemptions} preemptions")
    return tally


@dataclass
class SampledRuns:
    """The same seeded requests, n choices each, run in several ways."""

    sampling: Mapping[str, Any]
    choices: int = 2
    prompts: Sequence[Sequence[int]] = field(default_factory=lambda: BATCH_PROMPTS[:6])

    def alone(self) -> list[Output]:
        """Each in a cluster without any other."""
        found: list[Output] = []
        with DenseCluster(batch_model().folder, SHARDINGS["monolithic"]) as cluster:
            for submission in self.submissions():
                found += cluster.generate([submission])
        return found

    def together(self, shape: Shape) -> list[Output]:
        """All as one batch."""
        with DenseCluster(batch_model().folder, shape) as cluster:
            return cluster.generate(self.submissions())

    def submissions(self) -> list[Submission]:
        """The requests: prompt by prompt, choice by choice."""
        return [
            request(
                prompt,
                GENERATED_TOKENS,
                key=SequenceKey(f"sampled-{index}", choice),
                logprobs=0,
                **{**self.sampling, "seed": 1000 + index},
            )
            for index, prompt in enumerate(self.prompts)
            for choice in range(self.choices)
        ]


def sampled(name: str) -> Tally:
    """Same seed and choice, same tokens: alone, in a batch, over shardings, preempted; choices differ."""
    runs, tally = SampledRuns(SAMPLINGS[name]), Tally()
    alone = runs.alone()
    references = [
        Expected(output.token_ids, output.gaps, [value or 0.0 for value in output.logprobs])
        for output in alone
    ]
    shapes = {name: SHARDINGS[name] for name in ("monolithic", "2 workers", "5 workers")}
    shapes["small arenas"] = SMALL_ARENAS["3 workers"]
    for title, shape in shapes.items():
        tally.add(_compare_all(f"sampled by {name}, {title}", runs.together(shape), references))
    for first, second in itertools.pairwise(alone):
        tally.demand(first.token_ids != second.token_ids, f"sampled by {name}: two outputs are equal")
    return tally


def transports(transport: str) -> Tally:
    """The batch of 16 over two and five workers on one transport."""
    tally, model = Tally(), batch_model()
    for name in ("2 workers", "5 workers"):
        shape = replace(SHARDINGS[name], transports=(transport,))
        with DenseCluster(model.folder, shape) as cluster:
            outputs = cluster.generate(_greedy(prompt) for prompt in BATCH_PROMPTS)
        tally.add(_compare_all(f"{transport}, {name}", outputs, model.references))
    return tally


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _folder() -> Path:
    """A new folder that is removed when the process ends."""
    holder = tempfile.TemporaryDirectory(prefix="anabranch-oracle-")
    _folders.append(holder)
    return Path(holder.name)


def _greedy(prompt: Sequence[int]) -> Submission:
    return request(prompt, GENERATED_TOKENS, logprobs=0)


def _references(folder: Path, prompts: Sequence[Sequence[int]]) -> list[Expected]:
    return [
        _with_logprobs(folder, prompt, found)
        for prompt, found in zip(prompts, reference_tokens(folder, prompts, GENERATED_TOKENS), strict=True)
    ]


def _with_logprobs(folder: Path, prompt: Sequence[int], found: Reference) -> Expected:
    """The log-probabilities come from other runs of the model: one pass each over the whole text."""
    text = [*prompt, *found.tokens[:-1]]
    exact, rounded = (
        reference_logits(folder, text, dtype)[len(prompt) - 1 :].log_softmax(-1)
        for dtype in (torch.float64, torch.float32)
    )
    chosen = torch.tensor(found.tokens)[:, None]
    columns = (logprobs.gather(1, chosen)[:, 0].tolist() for logprobs in (exact, rounded))
    return Expected(found.tokens, found.gaps, *columns)


def _scaled(shape: Shape, step_tokens: int, block_tokens: int) -> Shape:
    """Another step and block size; a local arena that shall overflow keeps about 48 tokens."""
    local = shape.local_blocks if not shape.attention_workers else -(-48 // block_tokens)
    return replace(
        shape,
        step_tokens=step_tokens,
        block_tokens=block_tokens,
        local_blocks=local if shape.local_blocks else 0,
    )


def _compare_all(title: str, outputs: Sequence[Output], references: Sequence[Expected]) -> Tally:
    tally = Tally()
    for index, output in enumerate(outputs):
        tally.add(compare(f"{title}, prompt {index}", output, references[index]))
    return tally
