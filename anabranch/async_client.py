"""The client for asyncio; `client.Client` with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeAlias, TypeVar, Unpack

import grpc

from anabranch.addresses import LOOKUP_S, Gateway, Lookup, Resolve, doubt, system_addresses
from anabranch.answers import Health, Model, Tokenized, Topology
from anabranch.async_stream import AsyncStream, ResponseCall, wait
from anabranch.channels import Channels
from anabranch.failover import Failover, next_pause_s
from anabranch.gateways import HEALTH_TIMEOUT_S, SILENCE_S, Gateways, health_of, health_request
from anabranch.requests import ChatMessages, GenerateOptions, generate_request, tokenize_request
from anabranch.resume import Generation
from anabranch.v1 import inference_pb2, inference_pb2_grpc
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import NotFound, Unavailable
from cluster.health import HEALTH_CHECK

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Stub: TypeAlias = "inference_pb2_grpc.InferenceServiceAsyncStub"  # exists for type checkers only
_Method: TypeAlias = "Callable[[_Stub], grpc.aio.UnaryUnaryMultiCallable[_Request, _Response]]"


class AsyncClient:
    """`client.Client` for asyncio: same arguments, same promises; belongs to one event loop.

    >>> from anabranch import AsyncClient
    >>> async def main():
    ...     async with AsyncClient("127.0.0.1:8650") as client:
    ...         async for event in client.generate("The river", max_tokens=3):
    ...             print(event.text, end="")
    >>> asyncio.run(main())
     flows to the
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls: TlsConfig | None = None,
        timeout_s: float = 600.0,
        outage_s: float = 30.0,
        silence_s: float = SILENCE_S,
        resolve: Resolve = system_addresses,
    ) -> None:
        self._gateways = Gateways(
            addresses,
            api_key=api_key,
            tls=tls,
            timeout_s=timeout_s,
            outage_s=outage_s,
            silence_s=silence_s,
            resolve=resolve,
        )
        self._channels = Channels(self._connect)
        self._closed = asyncio.Event()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: ChatMessages | None = None,
        token_ids: Sequence[int] | None = None,
        model: str = "",
        request_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncStream:
        """`Client.generate`; iterate with `async for`, or await its `text()`.

        >>> run(client.generate("The river", temperature=0, max_tokens=9, stop=" sea").text())
        ' flows to the'
        """
        request = generate_request(prompt, messages, token_ids, model, request_id, options)
        return AsyncStream(Generation(request), self._gateways.failover(deadline_s), self._open)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        model: str = "",
        add_special_tokens: bool | None = None,
    ) -> Tokenized:
        """The token ids of a text, or of a conversation as the model's template renders it.

        >>> run(client.tokenize("The river"))
        Tokenized(token_ids=(0, 1), max_sequence_length=4096)
        """
        request = tokenize_request(text, messages, model, add_special_tokens)
        return Tokenized.from_proto(await self._ask(lambda stub: stub.Tokenize, request))

    async def models(self) -> tuple[Model, ...]:
        """The models served.

        >>> [model.name for model in run(client.models())]
        ['scripted']
        """
        answer = await self._ask(lambda stub: stub.ListModels, inference_pb2.ListModelsRequest())
        return tuple(map(Model.from_proto, answer.models))

    async def topology(self, request_id: str | None = None) -> Topology:
        """The members of the cluster and, of a live request, where its KV lies.

        A request is known to the gateway that serves it, so all are asked. Raises NotFound when none
        knows it.

        >>> [member.worker_id for member in run(client.topology()).members]
        ['gateway-0']
        """
        request = inference_pb2.GetTopologyRequest(request_id=request_id)
        if request_id is None:
            return Topology.from_proto(await self._ask(lambda stub: stub.GetTopology, request))
        answer = await self._ask_each(lambda stub: stub.GetTopology, request, lambda _: True)
        if answer is None:
            raise NotFound(f"no gateway serves a request {request_id}")
        return Topology.from_proto(answer)

    async def abort(self, request_id: str) -> bool:
        """End a request at whichever gateway serves it; whether one did.

        Raises Unavailable when a gateway that might serve it cannot be reached.

        >>> run(client.abort("no such request"))
        False
        """
        request = inference_pb2.AbortRequest(request_id=request_id)
        return await self._ask_each(lambda stub: stub.Abort, request, lambda answer: answer.found) is not None

    async def health(self) -> dict[str, Health]:
        """The condition of each gateway, by address; never raises.

        >>> list(run(client.health()).values())
        [<Health.READY: 'ready'>]
        """
        await self._look_up()
        return {each.address: await self._health(each) for each in self._gateways.addresses.known()}

    async def close(self) -> None:
        """Close all connections; streams that are open break."""
        self._closed.set()
        for channel in self._channels.take_all():
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _connect(self, gateway: Gateway) -> grpc.aio.Channel:
        settings = self._gateways
        return rpc.aio_channel(
            gateway.address, settings.tls, settings.message_bytes, settings.silence_ms, gateway.server_name
        )

    async def _channel(self, gateway: Gateway, call_s: float) -> grpc.aio.Channel:
        for channel in self._channels.take_unneeded(self._gateways.addresses.known()):
            await channel.close()
        return self._channels.to(gateway, call_s)

    async def _stub(self, failover: Failover) -> _Stub:
        """Of the gateway whose turn it is; before the first one names are looked up."""
        await _await_lookup(self._gateways.addresses.first_lookup, min(LOOKUP_S, failover.remaining_s()))
        channel = await self._channel(failover.gateway(), failover.remaining_s())
        return inference_pb2_grpc.InferenceServiceStub(channel)

    async def _look_up(self) -> Unavailable | None:
        """Learn which gateways there are now; returns why that is not certain."""
        lookup = self._gateways.addresses.look_up()
        await _await_lookup(lookup, LOOKUP_S)
        return doubt(lookup)

    async def _open(self, failover: Failover, request: inference_pb2.GenerateRequest) -> ResponseCall:
        stub = await self._stub(failover)
        return stub.Generate(request, timeout=failover.remaining_s(), metadata=self._gateways.metadata)

    async def _ask(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        failover: Failover | None = None,
    ) -> _Response:
        """Ask until a gateway answers; every unary call of the service is idempotent."""
        failover = failover or self._gateways.failover()
        while True:
            call = method(await self._stub(failover))
            try:
                return await call(request, timeout=failover.remaining_s(), metadata=self._gateways.metadata)
            except grpc.RpcError as error:
                pause_s = next_pause_s(failover, error)
            await wait(self._closed, pause_s)

    async def _ask_each(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        wanted: Callable[[_Response], bool],
    ) -> _Response | None:
        """Ask one gateway after the other for what one of them knows; None when none does.

        Raises Unavailable when one that might know it could not be reached, or found.
        """
        failure = await self._look_up()
        for gateway in self._gateways.addresses.known():
            try:
                answer = await self._ask(method, request, self._gateways.once(gateway))
            except NotFound:
                continue
            except Unavailable as error:
                failure = error
                continue
            if wanted(answer):
                return answer
        if failure:
            raise failure
        return None

    async def _health(self, gateway: Gateway) -> Health:
        check = (await self._channel(gateway, HEALTH_TIMEOUT_S)).unary_unary(*HEALTH_CHECK)
        try:
            return health_of(await check(health_request(), timeout=HEALTH_TIMEOUT_S))
        except grpc.RpcError as error:
            return health_of(error)


async def _await_lookup(lookup: Lookup, seconds: float) -> None:
    """Return when it is over, or the time is."""
    if not lookup.done():
        await asyncio.wait((asyncio.wrap_future(lookup),), timeout=seconds)
