"""Bodies of the OpenAI-compatible HTTP API, and the requests of the public contract they stand for.

A field that is not known is refused: a misspelt option that does nothing is worse than an error. Known
fields that change nothing here are dropped; those for what is not implemented pass with the value that
asks for nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from anabranch.v1 import inference_pb2, types_pb2
from cluster.errors import InvalidRequest

_UINT32_MAX = 2**32 - 1
_SEED_MASK = 2**64 - 1

_DROPPED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Known to clients, not implemented: the values besides null that ask for nothing."""

TokenId = Annotated[StrictInt, Field(ge=0, le=_UINT32_MAX)]
_Count = Annotated[int, Field(ge=0, le=_UINT32_MAX)]


class StreamOptions(BaseModel):
    """What a stream reports besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(BaseModel):
    """What both ways of generating share."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    request_id: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: _Count | None = None
    max_tokens: _Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, le=_UINT32_MAX)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[_Count, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=_SEED_MASK)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    @property
    def usage_wanted(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_everywhere(self) -> bool:
        """Whether every chunk carries the usage so far."""
        return self.usage_wanted and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def _request(self, max_tokens: int | None, logprobs: int | None) -> inference_pb2.GenerateRequest:
        """Everything but the prompt. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options without stream: true", field="stream_options")
        sampling = types_pb2.SamplingParameters(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else self.seed & _SEED_MASK,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )
        return inference_pb2.GenerateRequest(
            model=self.model,
            request_id=self.request_id,
            sampling=sampling,
            n=self.n,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            priority=self.priority,
            include_stop=self.include_stop_str_in_output,
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: _Count | None = None

    def requests(self) -> list[inference_pb2.GenerateRequest]:
        """One request per prompt."""
        prompts = self._prompts()
        requests = []
        for index, prompt in enumerate(prompts):
            request = self._request(self.max_tokens, self.logprobs)
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.tokens.CopyFrom(inference_pb2.TokenPrompt(token_ids=prompt))
            if request.request_id and len(prompts) > 1:
                request.request_id += f"-{index}"
            requests.append(request)
        return requests

    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("the prompt is empty: give at least one token", field="prompt")
        if isinstance(self.prompt[0], int):
            return [_PROMPT_TOKENS.validate_python(self.prompt)]
        return _PROMPT_LIST.validate_python(self.prompt)


_PROMPT_TOKENS = TypeAdapter(list[int])
_PROMPT_LIST = TypeAdapter(list[str | list[int]])


class TextPart(BaseModel):
    """One part of a message's content; text is all that is served."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: object) -> object:
        """Say what is wrong with an image, instead of what each other form of content would have been."""
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise PydanticCustomError(
                    "text_only", "only text parts are supported, not {kind}", {"kind": repr(kind)}
                )
        return content

    def to_proto(self) -> inference_pb2.ChatMessage:
        """As the public contract has it; `developer` is the newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        if self.content is None and role != "assistant":
            raise InvalidRequest(f"a message of role {self.role!r} has no content", field="messages")
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return inference_pb2.ChatMessage(role=role, content=content)


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: _Count | None = None

    def requests(self) -> list[inference_pb2.GenerateRequest]:
        """The one request."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", field="top_logprobs")
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        request = self._request(asked, (self.top_logprobs or 0) if self.logprobs else None)
        messages = [message.to_proto() for message in self.messages]
        request.chat.CopyFrom(inference_pb2.ChatPrompt(messages=messages))
        return [request]


class TokenizeBody(BaseModel):
    """POST /tokenize: a prompt or messages."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None

    def request(self) -> inference_pb2.TokenizeRequest:
        """The request it stands for."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either prompt or messages")
        request = inference_pb2.TokenizeRequest(model=self.model, add_special_tokens=self.add_special_tokens)
        if self.messages is None:
            request.text = self.prompt or ""
        else:
            messages = [message.to_proto() for message in self.messages]
            request.chat.CopyFrom(inference_pb2.ChatPrompt(messages=messages))
        return request


Body = TypeVar("Body", bound=BaseModel)


def read_body(shape: type[Body], raw: bytes) -> Body:
    """JSON to a body. Raises InvalidRequest naming the field."""
    try:
        fields = _OBJECT.validate_json(raw)
    except ValidationError as error:
        raise InvalidRequest(f"the body is not a JSON object: {error.errors()[0]['msg']}") from error
    kept = {name: value for name, value in fields.items() if _matters(shape, name, value)}
    try:
        return shape.model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{name}: {first['msg']}", field=str(first["loc"][0])) from error


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def _matters(shape: type[BaseModel], name: str, value: object) -> bool:
    """Whether a field is for `shape`. Raises InvalidRequest for one nobody knows or implements."""
    if name in shape.model_fields:
        return True
    if name in _DROPPED:
        return False
    if name in _NEUTRAL:
        if value is not None and value not in _NEUTRAL[name]:
            raise InvalidRequest(f"{name} is not supported: leave it out", field=name)
        return False
    near = difflib.get_close_matches(name, shape.model_fields, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidRequest(f"unknown field {name!r}{hint}", field=name)
