"""How the decoder talks to attention, and what half precision promises."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.memory_attention import MemoryAttention, finish, run_step
from tests.models import random_prompt, reference_logits, tiny_model
from workers.dense.model import Decoder


class Bounds(NamedTuple):
    """Errors of logits against float32, as shares of the logits' standard deviation."""

    mean: float
    largest: float


HALF_PRECISION: dict[torch.dtype, Bounds] = {
    # 8 bits of mantissa: each of some 15 roundings a layer adds 2^-9; measured mean 0.020, largest 0.13.
    torch.bfloat16: Bounds(mean=0.03, largest=0.2),
    # 11 bits: an eighth of that; measured mean 0.0025, largest 0.04.
    torch.float16: Bounds(mean=0.004, largest=0.06),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny model per architecture; do not write into them."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model(root / name, name) for name in ("llama", "qwen2", "qwen3", "smollm3")}


def prompt_rows(tokens: list[int], sequence: int = 0) -> list[tuple[int, int, int]]:
    """Rows (sequence, position, token) of a whole prompt."""
    return [(sequence, position, token_id) for position, token_id in enumerate(tokens)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("dtype", list(HALF_PRECISION), ids=str)
def test_half_precision_stays_within_its_bounds(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    """Logits in bfloat16 and float16 keep stated distances from float32, and from transformers' own error."""
    tokens = random_prompt(64, seed=5)
    exact = reference_logits(folders[name], tokens)
    decoder = Decoder.from_folder(folders[name], dtype)
    ours = decoder.logits(run_step(decoder, MemoryAttention(decoder.spec), prompt_rows(tokens)))
    theirs = reference_logits(folders[name], tokens, dtype)
    error, spread = (ours - exact).abs(), exact.std()
    assert float(error.mean() / spread) < HALF_PRECISION[dtype].mean
    assert float(error.max() / spread) < HALF_PRECISION[dtype].largest
    assert float(error.mean()) < 1.2 * float((theirs - exact).abs().mean())


def test_each_layer_sends_query_then_key_and_value_then_waits(folders: dict[str, Path]) -> None:
    """The order that lets attention start early, and one yield a layer exactly before each wait."""
    decoder = Decoder.from_folder(folders["llama"])
    attention = MemoryAttention(decoder.spec)
    attention.plan([(0, 0), (0, 1)])
    step = decoder.forward(torch.tensor([5, 6]), torch.tensor([0, 1]), attention)
    for layer in range(decoder.spec.layers):
        next(step)
        assert attention.calls[-2:] == [("query", layer), ("key_value", layer)]
        assert len(attention.calls) == 3 * layer + 2
    with pytest.raises(StopIteration) as end:
        next(step)
    assert end.value.value.shape == (2, decoder.spec.hidden_size)
    assert attention.calls[-1] == ("receive", decoder.spec.layers - 1)


def test_the_query_leaves_before_key_and_value_are_computed(folders: dict[str, Path]) -> None:
    """A port that refuses the query is asked nothing more: k and v did not exist yet."""

    class Refused(Exception):
        """Ends the step at the first query."""

    class Refusing(MemoryAttention):
        """A port whose first call fails."""

        def send_query(self, layer: int, query: Tensor) -> None:
            super().send_query(layer, query)
            raise Refused

    decoder = Decoder.from_folder(folders["llama"])
    attention = Refusing(decoder.spec)
    with pytest.raises(Refused):
        next(decoder.forward(torch.tensor([5]), torch.tensor([0]), attention))
    assert attention.calls == [("query", 0)]


def test_two_micro_batches_interleave_without_touching_each_other(folders: dict[str, Path]) -> None:
    """Layer by layer in turn, each gives the same bits as alone, and no inference mode leaks between."""
    decoder = Decoder.from_folder(folders["smollm3"])
    prompts = [random_prompt(7, seed=1), random_prompt(11, seed=2)]
    alone = [run_step(decoder, MemoryAttention(decoder.spec), prompt_rows(tokens)) for tokens in prompts]

    steps: list[Generator[None, None, Tensor]] = []
    for tokens in prompts:
        attention = MemoryAttention(decoder.spec)
        attention.plan([(0, position) for position in range(len(tokens))])
        steps.append(decoder.forward(torch.tensor(tokens), torch.arange(len(tokens)), attention))
    for _ in range(decoder.spec.layers):
        for step in steps:
            next(step)
            assert not torch.is_inference_mode_enabled()
    for step, expected in zip(steps, alone, strict=True):
        assert torch.equal(finish(step), expected)


def test_the_same_step_gives_the_same_bits(folders: dict[str, Path]) -> None:
    """The same plan and thread count: bit-identical, run to run and after loading again."""
    tokens = random_prompt(40, seed=3)
    outcomes = []
    for decoder in (Decoder.from_folder(folders["qwen2"]), Decoder.from_folder(folders["qwen2"])):
        outcomes += [run_step(decoder, MemoryAttention(decoder.spec), prompt_rows(tokens)) for _ in range(2)]
    assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)


def test_rows_of_many_sequences_and_sizes_share_a_step(folders: dict[str, Path]) -> None:
    """Chunks of one sequence beside single rows of others: each row as if its sequence were alone."""
    decoder = Decoder.from_folder(folders["qwen3"])
    prompts = [random_prompt(length, seed=length) for length in (1, 6, 13)]
    shared = MemoryAttention(decoder.spec)
    rows = [row for sequence, tokens in enumerate(prompts) for row in prompt_rows(tokens, sequence)]
    mixed = decoder.logits(run_step(decoder, shared, rows)).tensor_split([1, 7])
    for tokens, logits in zip(prompts, mixed, strict=True):
        alone = decoder.logits(run_step(decoder, MemoryAttention(decoder.spec), prompt_rows(tokens)))
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3"])
def test_the_gpu_gives_the_logits_of_the_cpu(folders: dict[str, Path], name: str) -> None:
    """Float32 on the GPU, without TF32, is the CPU's up to the order of sums."""
    rows = prompt_rows(random_prompt(64, seed=6))
    outcomes = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        decoder = Decoder.from_folder(folders[name], torch.float32, device)
        hidden = run_step(decoder, MemoryAttention(decoder.spec), rows)
        outcomes.append(decoder.logits(hidden).log_softmax(-1).cpu())
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-3, rtol=0)
