"""What a stream delivers: typed, immutable events, one set for both clients."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from anabranch.v1 import inference_pb2, types_pb2


class FinishReason(StrEnum):
    """Why an output ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""

    LENGTH = "length"
    """`max_tokens`, or the end of the model's context."""

    ABORT = "abort"
    """Somebody ended the request."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the most probable tokens of a position; `logprob` is a natural logarithm."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a delivered token, and the best alternatives, best first."""

    logprob: float
    alternatives: tuple[Alternative, ...]

    @classmethod
    def from_proto(cls, message: types_pb2.TokenLogprobs) -> TokenLogprobs:
        """The typed form of a message."""
        best = tuple(Alternative(item.token_id, item.logprob) for item in message.alternatives)
        return cls(message.logprob, best)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted for one choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def from_proto(cls, message: inference_pb2.Usage) -> Usage:
        """The typed form of a message."""
        return cls(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the seconds of one choice went; the parts are explained in proto/anabranch/v1/types.proto."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    dense_seconds: float
    attention_seconds: float
    lane_seconds: float
    waited_seconds: float
    preemptions: int

    @classmethod
    def from_proto(cls, message: types_pb2.Timings) -> Timings:
        """The typed form of a message."""
        return cls(
            queue_seconds=message.queue_seconds,
            prefill_seconds=message.prefill_seconds,
            decode_seconds=message.decode_seconds,
            dense_seconds=message.dense_seconds,
            attention_seconds=message.attention_seconds,
            lane_seconds=message.lane_seconds,
            waited_seconds=message.waited_seconds,
            preemptions=message.preemptions,
        )


@dataclass(frozen=True, slots=True)
class Started:
    """The first event, once per stream however often it was resumed: what the gateway resolved."""

    request_id: str
    model: str
    prompt_tokens: int
    seed: int

    @property
    def text(self) -> str:
        """Empty."""
        return ""


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice, and the text that became certain with them.

    Tokens may come without text (half a character; what could begin a stop string) and, at the end,
    text without tokens. The texts of a choice joined are its output, whole.
    """

    choice: int
    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of one choice. At most one of `matched_stop` and `matched_token_id` is set."""

    choice: int
    reason: FinishReason
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    matched_token_id: int | None = None

    @property
    def text(self) -> str:
        """Empty."""
        return ""

    @classmethod
    def from_proto(cls, message: inference_pb2.Finished) -> Finished:
        """The typed form of a message."""
        name = types_pb2.FinishReason.Name(message.reason)
        return cls(
            choice=message.choice,
            reason=FinishReason(name.removeprefix("FINISH_REASON_").lower()),
            usage=Usage.from_proto(message.usage),
            timings=Timings.from_proto(message.timings),
            matched_stop=message.matched_stop if message.HasField("matched_stop") else None,
            matched_token_id=message.matched_token_id if message.HasField("matched_token_id") else None,
        )


Event: TypeAlias = Started | TokenDelta | Finished
"""One step of a stream; each has `.text`."""
