"""Every check of the public API: a request as it came becomes a plan, or a clear error.

The checks that need no tokenizer come first, so that a bad request costs nothing.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import replace

from anabranch import wire
from anabranch.v1 import inference_pb2, types_pb2
from cluster.config import GatewayConfig
from cluster.errors import AlreadyExists, InvalidRequest
from workers.gateway.callers import Caller
from workers.gateway.request_plan import STREAM_GENERATION_MAX, RequestPlan
from workers.gateway.served_model import ServedModel
from workers.gateway.text_work import TextWork

STOP_STRINGS_MAX = 16
STOP_STRING_CHARACTERS_MAX = 256
CHAT_ROLES = ("system", "user", "assistant")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Admission:
    """Turns requests into plans. Raises InvalidRequest, NotFound (model), PermissionDenied."""

    def __init__(self, model: ServedModel, limits: GatewayConfig, work: TextWork) -> None:
        self._model = model
        self._limits = limits
        self._work = work

    async def admit(self, request: inference_pb2.GenerateRequest, caller: Caller) -> RequestPlan:
        """The plan of a Generate request."""
        self._model.require(request.model)
        choices = self._read_choices(request)
        _check_stop(request.stop)
        _check_request_id(request)
        sampling = wire.sampling_value(request.sampling)
        sampling.validate(self._model.spec.vocabulary_size)
        generation, received, shard_maps = self._read_resume(request, choices)
        prompt = await self._read_prompt(request)
        max_tokens = self._resolve_max_tokens(sampling.max_tokens, len(prompt), caller)
        seed = request.resume.seed if request.HasField("resume") else sampling.seed
        resolved = replace(
            sampling, max_tokens=max_tokens, seed=secrets.randbits(64) if seed is None else seed
        )
        resolved.validate(self._model.spec.vocabulary_size)  # min_tokens against the resolved max_tokens
        if any(len(tokens) > max_tokens for tokens in received):
            raise InvalidRequest(f"resume.received holds more than max_tokens {max_tokens} tokens")
        return RequestPlan(
            request_id=request.request_id or secrets.token_hex(16),
            model=self._model.name,
            prompt_token_ids=prompt,
            sampling=resolved,
            choices=choices,
            stop=tuple(request.stop),
            include_stop=request.include_stop,
            priority=request.priority,
            tenant=caller.tenant,
            generation=generation,
            received=received,
            shard_maps=shard_maps,
        )

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> list[int]:
        """Token ids of a Tokenize request."""
        self._model.require(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("no input: set text or chat")
        if kind == "chat":
            return await self._tokenize_chat(request.chat)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True
        text = request.text
        return await self._work.run(lambda: self._model.tokenizer.encode(text, special))

    async def _read_prompt(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("no prompt: set text, tokens or chat")
        if kind == "tokens":
            tokens = tuple(request.tokens.token_ids)
            self._check_vocabulary("prompt", tokens)
        elif kind == "chat":
            tokens = tuple(await self._tokenize_chat(request.chat))
        else:
            text = request.text
            tokens = tuple(await self._work.run(lambda: self._model.tokenizer.encode(text))) if text else ()
        if not tokens:
            raise InvalidRequest("the prompt is empty: give at least one token")
        return tokens

    async def _tokenize_chat(self, chat: inference_pb2.ChatPrompt) -> list[int]:
        if not chat.messages:
            raise InvalidRequest("the chat has no messages: give at least one")
        for message in chat.messages:
            if message.role not in CHAT_ROLES:
                raise InvalidRequest(f"chat role {message.role!r} must be one of {', '.join(CHAT_ROLES)}")
        messages = [{"role": message.role, "content": message.content} for message in chat.messages]
        return await self._work.run(lambda: self._model.tokenizer.encode_chat(messages))

    def _read_choices(self, request: inference_pb2.GenerateRequest) -> int:
        choices = request.n if request.HasField("n") else 1
        if not 1 <= choices <= self._limits.max_choices:
            raise InvalidRequest(f"n is {choices}, must be in [1, {self._limits.max_choices}]", field="n")
        return choices

    def _resolve_max_tokens(self, asked: int | None, prompt_tokens: int, caller: Caller) -> int:
        """An absent max_tokens is the gateway's default, cut to what the context and the key leave."""
        longest = self._model.max_sequence_length
        left = longest - prompt_tokens
        if left < 1:
            raise InvalidRequest(
                f"the prompt has {prompt_tokens} tokens and the longest sequence served, output included, "
                f"is {longest}: shorten it"
            )
        if asked is None:
            return min(self._limits.default_max_tokens, left, caller.max_tokens or left)
        if asked > left:
            raise InvalidRequest(
                f"{prompt_tokens} prompt tokens and max_tokens {asked} exceed the longest sequence served, "
                f"{longest}: shorten the prompt or ask for at most {left} tokens"
            )
        caller.require_tokens(asked)
        return asked

    def _read_resume(
        self, request: inference_pb2.GenerateRequest, choices: int
    ) -> tuple[int, tuple[tuple[int, ...], ...], tuple[types_pb2.ShardMap | None, ...]]:
        """Generation, received tokens and shard maps, per choice."""
        if not request.HasField("resume"):
            if request.shard_maps:
                raise InvalidRequest("shard_maps without resume: they say where a broken stream's KV lay")
            return 1, ((),) * choices, (None,) * choices
        resume = request.resume
        if not request.request_id:
            raise InvalidRequest("resume without request_id: name the request to resume")
        if not 2 <= resume.generation <= STREAM_GENERATION_MAX:
            raise InvalidRequest(
                f"resume.generation is {resume.generation}, must be in [2, {STREAM_GENERATION_MAX}]"
            )
        received = tuple(tuple(tokens.token_ids) for tokens in resume.received)
        if len(received) != choices or len(request.shard_maps) not in (0, choices):
            raise InvalidRequest(f"resume.received and shard_maps must name all {choices} choices, in order")
        for tokens in received:
            self._check_vocabulary("resume.received", tokens)
        maps = tuple(entry if entry.shards else None for entry in request.shard_maps)
        return resume.generation, received, maps or (None,) * choices

    def _check_vocabulary(self, name: str, token_ids: Sequence[int]) -> None:
        size = self._model.spec.vocabulary_size
        highest = max(token_ids, default=0)
        if highest >= size:
            raise InvalidRequest(f"{name}: token id {highest} is outside the vocabulary of {size}")


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > STOP_STRINGS_MAX:
        raise InvalidRequest(f"{len(stop)} stop strings given, at most {STOP_STRINGS_MAX} are taken")
    for text in stop:
        if not 1 <= len(text) <= STOP_STRING_CHARACTERS_MAX:
            raise InvalidRequest(
                f"a stop string has {len(text)} characters, must have 1 to {STOP_STRING_CHARACTERS_MAX}"
            )


def _check_request_id(request: inference_pb2.GenerateRequest) -> None:
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest("request_id must be 1 to 128 letters, digits, or any of . _ : -")


def require_successor(generation: int, live_generation: int, request_id: str) -> None:
    """Let a live request be taken over by a higher generation only. Raises AlreadyExists."""
    if generation <= live_generation:
        raise AlreadyExists(
            f"request {request_id!r} is live in generation {live_generation}: pick another id, or resume "
            "with a higher generation"
        )
