"""Requests built from Python values, the same for both clients."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from anabranch.v1 import inference_pb2
from cluster.errors import InvalidRequest

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "logit_bias",
    "stop_token_ids",
)
_REQUEST_FIELDS = ("n", "stop", "priority", "include_stop")

CHOICES_MAX = 128
"""No gateway can be configured to allow more."""

ChatMessages = Sequence[Mapping[str, str]]
"""A conversation, oldest first: `[{"role": "user", "content": "Hello"}]`."""


class GenerateOptions(TypedDict, total=False):
    """How tokens are chosen. None, like absence, takes the gateway's default; ranges are checked there."""

    temperature: float | None
    """0 takes the most likely token; default 1."""

    top_p: float | None
    """Smallest set of tokens of this probability, in (0, 1]; default 1."""

    top_k: int | None
    """Number of candidates, 0 is all; default 0."""

    min_p: float | None
    """Least probability relative to the best, in [0, 1]; default 0."""

    repetition_penalty: float | None
    """Over prompt and output, above 0; default 1."""

    presence_penalty: float | None
    """Over output, in [-2, 2]; default 0."""

    frequency_penalty: float | None
    """Over output, in [-2, 2]; default 0."""

    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token ids, in [-100, 100]."""

    seed: int | None
    """64 bits; default: drawn by the client, so that a stream can be resumed from its very beginning."""

    n: int | None
    """Number of independent outputs; default 1."""

    max_tokens: int | None
    """Most tokens per output; default: what the context allows, at most the gateway's limit."""

    min_tokens: int | None
    """No end before this many tokens; default 0."""

    stop: str | Sequence[str] | None
    """One or several strings that end the output."""

    stop_token_ids: Sequence[int] | None
    """Token ids that end the output."""

    include_stop: bool | None
    """Deliver what stopped the output, too; default False."""

    ignore_eos: bool | None
    """Go on after the end-of-sequence token; default False."""

    logprobs: int | None
    """Report each token's log-probability, and those of this many alternatives."""

    priority: int | None
    """Lower is sooner; default 0."""


def generate_request(
    prompt: str | None,
    messages: ChatMessages | None,
    token_ids: Sequence[int] | None,
    model: str,
    request_id: str | None,
    options: GenerateOptions,
) -> inference_pb2.GenerateRequest:
    """The first request of a generation, with its id and seed drawn where they were not given.

    Raises InvalidRequest where a value does not fit its field, TypeError for an unknown option.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    unknown = given.keys() - {*_SAMPLING_FIELDS, *_REQUEST_FIELDS}
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    given.setdefault("seed", secrets.randbits(63))
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    request = inference_pb2.GenerateRequest(model=model, request_id=request_id or uuid.uuid4().hex)
    _set_prompt(request, prompt, messages, token_ids)
    for name, value in given.items():
        _set(request if name in _REQUEST_FIELDS else request.sampling, name, value)
    if request.HasField("n") and not 1 <= request.n <= CHOICES_MAX:
        raise InvalidRequest(f"n is {request.n}, must be an integer in [1, {CHOICES_MAX}]", field="n")
    return request


def tokenize_request(
    text: str | None, messages: ChatMessages | None, model: str, add_special_tokens: bool | None
) -> inference_pb2.TokenizeRequest:
    """What to tokenize. Raises InvalidRequest unless exactly one of text and messages is given."""
    if (text is None) == (messages is None):
        raise InvalidRequest("give either text or messages")
    request = inference_pb2.TokenizeRequest(model=model)
    if add_special_tokens is not None:
        request.add_special_tokens = add_special_tokens
    if messages is not None:
        request.chat.CopyFrom(_chat(messages))
    else:
        _set(request, "text", text)
    return request


def _set_prompt(
    request: inference_pb2.GenerateRequest,
    prompt: str | None,
    messages: ChatMessages | None,
    token_ids: Sequence[int] | None,
) -> None:
    if sum(value is not None for value in (prompt, messages, token_ids)) != 1:
        raise InvalidRequest("give exactly one of prompt, messages and token_ids")
    if messages is not None:
        request.chat.CopyFrom(_chat(messages))
    elif token_ids is not None:
        request.tokens.SetInParent()  # an empty prompt is still a prompt of tokens, refused by name
        _set(request.tokens, "token_ids", token_ids)
    else:
        _set(request, "text", prompt)


def _chat(messages: ChatMessages) -> inference_pb2.ChatPrompt:
    chat = inference_pb2.ChatPrompt()
    for index, message in enumerate(messages):
        try:
            chat.messages.add(role=message["role"], content=message["content"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                f"messages[{index}] is {message!r}, must have the texts role and content", field="messages"
            ) from error
    return chat


def _set(message: Any, name: str, value: Any) -> None:
    """Assign a field of any kind, with protobuf's refusal translated."""
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{name} is {value!r}: {error}", field=name) from error
