"""How one sequence wants its tokens chosen: the parameters and their allowed ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.errors import InvalidRequest

GREEDY_BELOW = 1e-5
"""Temperatures under this choose the best token: dividing by them would overflow float32 logits."""

STOP_TOKEN_IDS_MAX = 64
LOGIT_BIAS_MAX = 1024
LOGPROBS_MAX = 20
SEED_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """Sampling of one sequence; immutable, valid once `validate` has passed.

    Definitions are those of Hugging Face transformers and vLLM. The order of application is
    penalties, bias, masks of `min_tokens`, temperature, top_k, top_p, min_p.
    """

    temperature: float = 1.0
    """0 chooses the most likely token."""

    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach this sum."""

    top_k: int = 0
    """Keep this many best tokens; 0 keeps all."""

    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the best one."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""

    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids."""

    seed: int | None = None
    """64 bits; None lets the gateway draw one and resolve it before the sequence is submitted."""

    max_tokens: int | None = None
    """Most tokens to generate; None means as far as the context reaches (the gateway resolves it)."""

    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens."""

    stop_token_ids: tuple[int, ...] = ()
    """End the sequence like an end-of-sequence token, whether or not `ignore_eos` is set."""

    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens; load generators ask for it."""

    logprobs: int | None = None
    """Number of best alternatives to report with each token; None reports no log-probabilities."""

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without noise."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether logits depend on the tokens before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def forced_open(self, output_index: int) -> bool:
        """Whether end and stop tokens are still masked for the output token of this index."""
        return output_index < self.min_tokens

    def ends(self, token_id: int, eos_token_ids: tuple[int, ...]) -> bool:
        """Whether this token ends the sequence."""
        return token_id in self.stop_token_ids or (not self.ignore_eos and token_id in eos_token_ids)

    def validate(self, vocabulary_size: int) -> None:
        """Raise `InvalidRequest` naming the first field out of range, its value and the range."""
        _require_number("temperature", self.temperature, 0.0, 2.0)
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_integer("top_k", self.top_k, 0, vocabulary_size)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require_integer("seed", self.seed, 0, SEED_MAX)
        if self.max_tokens is not None:
            _require_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _require_integer(
            "min_tokens", self.min_tokens, 0, 2**31 - 1 if self.max_tokens is None else self.max_tokens
        )
        if self.logprobs is not None:
            _require_integer("logprobs", self.logprobs, 0, min(LOGPROBS_MAX, vocabulary_size))
        self._validate_token_ids(vocabulary_size)

    def _validate_token_ids(self, vocabulary_size: int) -> None:
        """Check the fields that name tokens, and how many they name."""
        _require_integer("number of stop_token_ids", len(self.stop_token_ids), 0, STOP_TOKEN_IDS_MAX)
        for token_id in self.stop_token_ids:
            _require_integer("stop_token_ids", token_id, 0, vocabulary_size - 1)
        _require_integer("number of logit_bias entries", len(self.logit_bias), 0, LOGIT_BIAS_MAX)
        for token_id, bias in self.logit_bias.items():
            _require_integer("logit_bias token id", token_id, 0, vocabulary_size - 1)
            _require_number(f"logit_bias of token {token_id}", bias, -100.0, 100.0)
        if self.min_tokens and len(set(self.stop_token_ids)) >= vocabulary_size:
            raise InvalidRequest(
                "min_tokens masks stop_token_ids, and these are the whole vocabulary: name fewer"
            )


def _require_number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is not a finite number of low..high (low excluded if `open_low`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidRequest(
            f"{name} is {value!r}, must be a number in {bracket}{low:g}, {high:g}]", field=name
        )


def _require_integer(name: str, value: int, low: int, high: int) -> None:
    """Refuse what is not an integer of low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {value!r}, must be an integer in [{low}, {high}]", field=name)
