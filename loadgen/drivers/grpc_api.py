"""Our own API, through the public client: a stream whose gateway is lost goes on at the next one."""

from __future__ import annotations

from anabranch import AsyncClient
from anabranch.events import Finished, Started, TokenDelta
from anabranch.requests import GenerateOptions
from cluster.errors import NotFound, Unavailable
from loadgen.drivers.interface import Ask, Endpoint, Hearing, Send, Target


class GrpcDriver:
    """A `Driver` of a cluster's gateways."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = AsyncClient(
            target.addresses,
            api_key=target.api_key,
            tls=target.tls,
            timeout_s=target.timeout_s,
            outage_s=target.outage_s,
        )

    async def endpoint(self) -> Endpoint:
        """See `Driver`."""
        models = await self._client.models()
        for model in models:
            if self._target.model in ("", model.name):
                return Endpoint(model.name, model.max_sequence_length, model.vocabulary_size, model.dilation)
        names = ", ".join(model.name for model in models)
        raise NotFound(f"there is no model {self._target.model!r}, but {names or 'none'}")

    def prepare(self, ask: Ask) -> Send:
        """See `Driver`."""
        options = GenerateOptions(
            max_tokens=ask.output_tokens, temperature=0.0, ignore_eos=self._target.ignore_eos
        )
        is_text = isinstance(ask.prompt, str)
        stream = self._client.generate(
            ask.prompt if isinstance(ask.prompt, str) else None,
            token_ids=None if isinstance(ask.prompt, str) else ask.prompt,
            model=self._target.model,
            request_id=ask.request_id,
            deadline_s=self._target.timeout_s,
            **options,
        )

        async def send(hearing: Hearing) -> None:
            hearing.send()  # nothing leaves before the stream is read
            async with stream:
                async for event in stream:
                    _hear(event, hearing, keeps_text=is_text)
            if not hearing.finish_reason:
                raise Unavailable("the stream ended before the request did")

        return send

    async def close(self) -> None:
        """See `Driver`."""
        await self._client.close()


def _hear(event: Started | TokenDelta | Finished, hearing: Hearing, *, keeps_text: bool) -> None:
    match event:
        case Started():
            hearing.prompt_tokens = event.prompt_tokens
        case TokenDelta():
            if event.token_ids:
                hearing.delta()
                hearing.delta_tokens.append(len(event.token_ids))
                hearing.output_tokens += len(event.token_ids)
            if keeps_text:
                hearing.texts.append(event.text)
            else:
                hearing.token_ids += event.token_ids
        case Finished():
            hearing.finish_reason = event.reason.value
            hearing.prompt_tokens = event.usage.prompt_tokens
            hearing.output_tokens = event.usage.completion_tokens
            hearing.cached_tokens = event.usage.cached_tokens
            hearing.timings = event.timings
