"""Events of the public contract as OpenAI's JSON: whole answers and the chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from anabranch.v1 import inference_pb2, types_pb2
from workers.gateway.metrics import REASONS
from workers.gateway.tokenizer import Tokenizer

Json = dict[str, object]


@dataclass(slots=True)
class Output:
    """One choice of an answer as far as it has come, or one chunk of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[types_pb2.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: inference_pb2.TokensDelta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)

    def finish(self, finished: inference_pb2.Finished) -> None:
        """Note the end."""
        self.finish_reason = REASONS[finished.reason]
        if finished.HasField("matched_stop"):
            self.stop_reason = finished.matched_stop
        elif finished.HasField("matched_token_id"):
            self.stop_reason = finished.matched_token_id


class Format(Protocol):
    """How one of the two APIs writes a choice."""

    prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, index: int) -> Json | None:
        """A choice's first chunk, before any text."""
        ...

    def whole(self, index: int, output: Output) -> Json:
        """A choice of a whole answer."""
        ...

    def chunk(self, index: int, output: Output, characters_before: int) -> Json:
        """A choice in a chunk; `output` holds only what is new."""
        ...


class CompletionFormat:
    """/v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, _index: int) -> Json | None:
        """See `Format`."""
        return None

    def whole(self, index: int, output: Output) -> Json:
        """See `Format`."""
        return self.chunk(index, output, 0)

    def chunk(self, index: int, output: Output, characters_before: int) -> Json:
        """See `Format`."""
        return {
            "index": index,
            "text": output.text,
            "logprobs": self._logprobs(output, characters_before),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _logprobs(self, output: Output, offset: int) -> Json | None:
        if not output.logprobs:
            return None
        tokens = [_spell(self._tokenizer, token_id) for token_id in output.token_ids]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in output.logprobs],
            "top_logprobs": [
                {_spell(self._tokenizer, best.token_id): best.logprob for best in entry.alternatives}
                for entry in output.logprobs
            ],
            "text_offset": offsets,
        }


class ChatFormat:
    """/v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def opening(self, index: int) -> Json | None:
        """See `Format`."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, output: Output) -> Json:
        """See `Format`."""
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, **self._ending(output)}

    def chunk(self, index: int, output: Output, characters_before: int) -> Json:  # noqa: ARG002  see `Format`
        """See `Format`."""
        delta: Json = {"content": output.text} if output.text or output.logprobs else {}
        return {"index": index, "delta": delta, **self._ending(output)}

    def _ending(self, output: Output) -> Json:
        content = [
            self._entry(token_id, entry.logprob)
            | {"top_logprobs": [self._entry(best.token_id, best.logprob) for best in entry.alternatives]}
            for token_id, entry in zip(output.token_ids, output.logprobs, strict=False)
        ]
        return {
            "logprobs": {"content": content, "refusal": None} if content else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _entry(self, token_id: int, logprob: float) -> Json:
        token = _spell(self._tokenizer, token_id)
        # A token that is part of a character has no text whose bytes could be told.
        spelt = None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())
        return {"token": token, "logprob": logprob, "bytes": spelt}


class Answer:
    """Collects the events of one HTTP request, which may hold several prompts of n choices each."""

    def __init__(self, form: Format, model: str, request_id: str, prompts: int, choices: int) -> None:
        self._form = form
        self._choices = choices
        self._head: Json = {
            "id": f"{form.prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self._outputs = [Output() for _ in range(prompts * choices)]
        self._prompt_tokens = 0
        self._cached_tokens = 0

    def add(self, prompt: int, event: inference_pb2.GenerateResponse) -> Json | None:
        """Take an event of the prompt of that number; returns the choice for a chunk, if it makes one."""
        kind = event.WhichOneof("event")
        if kind == "started":
            self._prompt_tokens += event.started.prompt_tokens
            return None
        if (
            kind == "finished" and event.finished.choice == 0
        ):  # the further choices share the first one's prompt
            self._cached_tokens += event.finished.usage.cached_tokens
        news, choice = Output(), event.delta.choice if kind == "delta" else event.finished.choice
        index = prompt * self._choices + choice
        whole = self._outputs[index]
        before = len(whole.text)
        for output in (news, whole):
            if kind == "delta":
                output.add(event.delta)
            else:
                output.finish(event.finished)
        if kind == "delta" and not (event.delta.token_ids or event.delta.text):
            return None  # a shard map, which is nothing for this API
        return self._form.chunk(index, news, before)

    def openings(self) -> Sequence[Json]:
        """The first chunks of all choices."""
        chunks = (self._form.opening(index) for index in range(len(self._outputs)))
        return [chunk for chunk in chunks if chunk is not None]

    def whole(self) -> Json:
        """The answer at the end."""
        choices = [self._form.whole(index, output) for index, output in enumerate(self._outputs)]
        return self._head | {"object": self._form.whole_object, "choices": choices, "usage": self.usage()}

    def chunk(self, choices: Sequence[Json], usage: Json | None) -> Json:
        """One message of a stream."""
        return self._head | {"object": self._form.chunk_object, "choices": choices, "usage": usage}

    def usage(self) -> Json:
        """Tokens so far, over all choices."""
        completion = sum(len(output.token_ids) for output in self._outputs)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


def _spell(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], skip_special_tokens=False)
