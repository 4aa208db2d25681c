"""A real model, SmolLM2-135M, against transformers: what random weights cannot show.

Trained weights have outliers, attention sinks and margins that random ones lack.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from tests.memory_attention import MemoryAttention, run_step
from tests.models import NEAR_TIE, near_tie_share, reference_logits, reference_tokens
from tests.oracle.matrix import LOGPROB_TOLERANCE
from tests.smollm2 import smollm2_folder
from workers.dense.model import Decoder

TEXT = (
    "A river that divides and joins itself again further down is called anabranching. Between 1968 and "
    "1984 the survey measured 3,417 such channels; most of them carried less than a tenth of the flow."
)
QUESTIONS = ("The capital of France is", "def fibonacci(n):\n    ")
GENERATED_TOKENS = 32


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """The model in float32."""
    return Decoder.from_folder(smollm2_folder())


def encode(text: str) -> list[int]:
    """Token ids of a text."""
    ids: list[int] = Tokenizer.from_file(str(smollm2_folder() / "tokenizer.json")).encode(text).ids
    return ids


def test_log_probabilities_of_a_text_equal_transformers(decoder: Decoder) -> None:
    """Teacher-forced in two chunks, log-probabilities agree with float64's, sharp tokens with float32's."""
    tokens = encode(TEXT)
    expected = reference_logits(smollm2_folder(), tokens)
    exact = reference_logits(smollm2_folder(), tokens, torch.float64)
    attention, cut = MemoryAttention(decoder.spec), 17
    rows = [(0, position, token_id) for position, token_id in enumerate(tokens)]
    logits = torch.cat(
        [decoder.logits(run_step(decoder, attention, part)) for part in (rows[:cut], rows[cut:])]
    )
    assert near_tie_share(expected) <= 0.02
    assert float((logits.log_softmax(-1) - exact.log_softmax(-1)).abs().max()) < LOGPROB_TOLERANCE
    best = expected.topk(2).values
    sharp = best[:, 0] - best[:, 1] >= NEAR_TIE
    assert torch.equal(logits.argmax(-1)[sharp], expected.argmax(-1)[sharp])


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_continuation_equals_transformers(decoder: Decoder, question: str) -> None:
    """Token for token up to the first near-tie, which must not come early."""
    prompt = encode(question)
    (reference,) = reference_tokens(smollm2_folder(), [prompt], GENERATED_TOKENS)
    attention, tokens = MemoryAttention(decoder.spec), list(prompt)
    while len(tokens) < len(prompt) + GENERATED_TOKENS:
        start = 0 if len(tokens) == len(prompt) else len(tokens) - 1
        rows = [(0, position, tokens[position]) for position in range(start, len(tokens))]
        tokens.append(int(decoder.logits(run_step(decoder, attention, rows)[-1:]).argmax()))
    sharp = reference.sharp_length()
    assert sharp >= GENERATED_TOKENS // 2
    assert tokens[len(prompt) :][:sharp] == list(reference.tokens[:sharp])
