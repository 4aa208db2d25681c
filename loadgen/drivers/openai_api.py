"""Any OpenAI-compatible endpoint: `/v1/completions`, streamed. The one translator of httpx.

Asks for token ids or text as planned, `ignore_eos` as vLLM, SGLang and our gateway take it, and usage in the
last chunk. A chunk with text, or without an end, is a delta; how many tokens it holds this API does not say.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any

from cluster.errors import (
    AnabranchError,
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from loadgen.drivers.interface import Ask, Endpoint, Hearing, Send, Target

try:
    import httpx
except ImportError as error:
    raise ConfigError("an OpenAI-compatible endpoint needs httpx: pip install 'anabranch[openai]'") from error

_BY_STATUS: Mapping[int, type[AnabranchError]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    422: InvalidRequest,
    429: ResourceExhausted,
    503: Unavailable,
    504: DeadlineExceeded,
}
_DATA = "data:"
_MESSAGE_MOST = 200
"""Characters of an error's body that are kept."""


class OpenAiDriver:
    """A `Driver` of one endpoint; `url` is what comes before `/v1/completions`, or ends in `/v1`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._model = target.model
        headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        authority = target.tls.authority
        trusted = ssl.create_default_context(cafile=authority) if authority else True
        self._http = httpx.AsyncClient(
            base_url=target.url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            verify=trusted,
            timeout=target.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def endpoint(self) -> Endpoint:
        """See `Driver`. Context and vocabulary are told by some servers only."""
        try:
            response = await self._http.get("/v1/models")
            if response.status_code != httpx.codes.OK:
                raise _refusal(response.status_code, response.content)
            models = {model["id"]: model for model in response.json()["data"]}
        except httpx.HTTPError as error:
            raise _lost(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Internal(f"{self._target.url}/v1/models is no list of models: {error!r}") from error
        self._model = self._model or next(iter(models), "")
        if self._model not in models:
            raise NotFound(f"there is no model {self._model!r}, but {', '.join(models) or 'none'}")
        return Endpoint(self._model, models[self._model].get("max_model_len"))

    def prepare(self, ask: Ask) -> Send:
        """See `Driver`."""
        body = {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self._target.ignore_eos else {}),
        }
        request = self._http.build_request(
            "POST", "/v1/completions", json=body, headers={"x-request-id": ask.request_id}
        )

        async def send(hearing: Hearing) -> None:
            hearing.send()
            try:
                async with asyncio.timeout(self._target.timeout_s):
                    await self._hear(request, hearing)
            except httpx.TimeoutException as error:
                raise DeadlineExceeded(f"no answer: {error!r}") from error
            except httpx.HTTPError as error:
                raise _lost(error) from error
            except TimeoutError as error:
                raise DeadlineExceeded(f"not done within {self._target.timeout_s:g} s") from error

        return send

    async def close(self) -> None:
        """See `Driver`."""
        await self._http.aclose()

    async def _hear(self, request: httpx.Request, hearing: Hearing) -> None:
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != httpx.codes.OK:
                raise _refusal(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                data = line.removeprefix(_DATA).strip() if line.startswith(_DATA) else ""
                if data and data != "[DONE]":
                    _take(data, hearing)
        finally:
            await response.aclose()
        if not hearing.finish_reason:
            raise Unavailable("the stream ended before the request did")
        hearing.output_tokens = hearing.output_tokens or len(hearing.deltas_s)


def _take(data: str, hearing: Hearing) -> None:
    """One event. Raises what the server reports in it."""
    try:
        chunk: dict[str, Any] = json.loads(data)
        if error := chunk.get("error"):
            raise Unavailable(f"the server reports {str(error)[:_MESSAGE_MOST]}")
        for choice in chunk.get("choices", ()):
            text, reason = choice.get("text") or "", choice.get("finish_reason")
            if text or not reason:
                hearing.delta()
            hearing.texts.append(text)
            hearing.finish_reason = reason or hearing.finish_reason
        if usage := chunk.get("usage"):
            hearing.prompt_tokens = usage["prompt_tokens"]
            hearing.output_tokens = usage["completion_tokens"]
            hearing.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Internal(f"not a chunk of a completion: {data[:_MESSAGE_MOST]}") from error


def _refusal(status: int, body: bytes) -> AnabranchError:
    kind = _BY_STATUS.get(status, Internal)
    return kind(f"HTTP {status}: {body.decode(errors='replace')[:_MESSAGE_MOST]}")


def _lost(error: httpx.HTTPError) -> Unavailable:
    return Unavailable(f"the connection failed: {error!r}")
