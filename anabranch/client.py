"""The synchronous client: text generation that goes on when a gateway does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from types import TracebackType
from typing import TypeAlias, TypeVar, Unpack

import grpc

from anabranch.addresses import LOOKUP_S, Gateway, Resolve, doubt, system_addresses
from anabranch.answers import Health, Model, Tokenized, Topology
from anabranch.channels import Channels
from anabranch.failover import Failover, next_pause_s
from anabranch.gateways import HEALTH_TIMEOUT_S, SILENCE_S, Gateways, health_of, health_request
from anabranch.requests import ChatMessages, GenerateOptions, generate_request, tokenize_request
from anabranch.resume import Generation
from anabranch.stream import ResponseCall, Stream
from anabranch.v1 import inference_pb2, inference_pb2_grpc
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import NotFound, Unavailable
from cluster.health import HEALTH_CHECK

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Method: TypeAlias = (  # a text, since gRPC's classes take type arguments in their stubs only
    "Callable[[inference_pb2_grpc.InferenceServiceStub], grpc.UnaryUnaryMultiCallable[_Request, _Response]]"
)


class Client:
    """Speaks to a cluster through any of its gateways; threads may share it.

    `addresses` are gateways of one cluster, host:port; `dns:///name:port` is all that the name resolves to,
    as they come and go (`resolve` looks it up). Calls begin at one after the other. A call whose gateway goes
    away is made again at the next one, and a stream goes on where it broke: each token and its text arrive
    exactly once. `timeout_s` is the deadline of a call that names none; a gateway that is silent for
    `silence_s` is left; after `outage_s` without an answer from any gateway the last failure is raised.
    Errors are those of cluster.errors.

    >>> from anabranch import Client
    >>> with Client("127.0.0.1:8650") as client:
    ...     for event in client.generate("The river", max_tokens=3):
    ...         print(event.text, end="")
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
        self._closed = threading.Event()

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
    ) -> Stream:
        """Continue a text, answer a conversation, or continue token ids; exactly one of the three.

        Nothing is sent before the stream is read. `deadline_s` is the time the whole request may take,
        resumes included. Further keyword arguments are those of `requests.GenerateOptions`.

        >>> client.generate(messages=[{"role": "user", "content": "Where to?"}], max_tokens=3).text()
        ' flows to the'
        >>> client.generate("The river", temperature=0, max_tokens=9, stop=" sea").text()
        ' flows to the'
        """
        request = generate_request(prompt, messages, token_ids, model, request_id, options)
        return Stream(Generation(request), self._gateways.failover(deadline_s), self._open)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: ChatMessages | None = None,
        model: str = "",
        add_special_tokens: bool | None = None,
    ) -> Tokenized:
        """The token ids of a text, or of a conversation as the model's template renders it.

        >>> client.tokenize("The river")
        Tokenized(token_ids=(0, 1), max_sequence_length=4096)
        """
        request = tokenize_request(text, messages, model, add_special_tokens)
        return Tokenized.from_proto(self._ask(lambda stub: stub.Tokenize, request))

    def models(self) -> tuple[Model, ...]:
        """The models served.

        >>> [model.name for model in client.models()]
        ['scripted']
        """
        answer = self._ask(lambda stub: stub.ListModels, inference_pb2.ListModelsRequest())
        return tuple(map(Model.from_proto, answer.models))

    def topology(self, request_id: str | None = None) -> Topology:
        """The members of the cluster and, of a live request, where its KV lies.

        A request is known to the gateway that serves it, so all are asked. Raises NotFound when none
        knows it.

        >>> [member.worker_id for member in client.topology().members]
        ['gateway-0']
        """
        request = inference_pb2.GetTopologyRequest(request_id=request_id)
        if request_id is None:
            return Topology.from_proto(self._ask(lambda stub: stub.GetTopology, request))
        answer = self._ask_each(lambda stub: stub.GetTopology, request, lambda _: True)
        if answer is None:
            raise NotFound(f"no gateway serves a request {request_id}")
        return Topology.from_proto(answer)

    def abort(self, request_id: str) -> bool:
        """End a request at whichever gateway serves it; whether one did.

        Raises Unavailable when a gateway that might serve it cannot be reached.

        >>> client.abort("no such request")
        False
        """
        request = inference_pb2.AbortRequest(request_id=request_id)
        return self._ask_each(lambda stub: stub.Abort, request, lambda answer: answer.found) is not None

    def health(self) -> dict[str, Health]:
        """The condition of each gateway, by address; never raises.

        >>> list(client.health().values())
        [<Health.READY: 'ready'>]
        """
        self._look_up()
        return {each.address: self._health(each) for each in self._gateways.addresses.known()}

    def close(self) -> None:
        """Close all connections; streams that are open break."""
        self._closed.set()
        for channel in self._channels.take_all():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _connect(self, gateway: Gateway) -> grpc.Channel:
        settings = self._gateways
        return rpc.channel(
            gateway.address, settings.tls, settings.message_bytes, settings.silence_ms, gateway.server_name
        )

    def _channel(self, gateway: Gateway, call_s: float) -> grpc.Channel:
        for channel in self._channels.take_unneeded(self._gateways.addresses.known()):
            channel.close()
        return self._channels.to(gateway, call_s)

    def _stub(self, failover: Failover) -> inference_pb2_grpc.InferenceServiceStub:
        """Of the gateway whose turn it is; before the first one names are looked up."""
        wait((self._gateways.addresses.first_lookup,), min(LOOKUP_S, failover.remaining_s()))
        channel = self._channel(failover.gateway(), failover.remaining_s())
        return inference_pb2_grpc.InferenceServiceStub(channel)

    def _look_up(self) -> Unavailable | None:
        """Learn which gateways there are now; returns why that is not certain."""
        lookup = self._gateways.addresses.look_up()
        wait((lookup,), LOOKUP_S)
        return doubt(lookup)

    def _open(self, failover: Failover, request: inference_pb2.GenerateRequest) -> ResponseCall:
        stub = self._stub(failover)
        return stub.Generate(request, timeout=failover.remaining_s(), metadata=self._gateways.metadata)

    def _ask(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        failover: Failover | None = None,
    ) -> _Response:
        """Ask until a gateway answers; every unary call of the service is idempotent."""
        failover = failover or self._gateways.failover()
        while True:
            call = method(self._stub(failover))
            try:
                return call(request, timeout=failover.remaining_s(), metadata=self._gateways.metadata)
            except grpc.RpcError as error:
                pause_s = next_pause_s(failover, error)
            self._closed.wait(pause_s)

    def _ask_each(
        self,
        method: _Method[_Request, _Response],
        request: _Request,
        wanted: Callable[[_Response], bool],
    ) -> _Response | None:
        """Ask one gateway after the other for what one of them knows; None when none does.

        Raises Unavailable when one that might know it could not be reached, or found.
        """
        failure = self._look_up()
        for gateway in self._gateways.addresses.known():
            try:
                answer = self._ask(method, request, self._gateways.once(gateway))
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

    def _health(self, gateway: Gateway) -> Health:
        check = self._channel(gateway, HEALTH_TIMEOUT_S).unary_unary(*HEALTH_CHECK)
        try:
            return health_of(check(health_request(), timeout=HEALTH_TIMEOUT_S))
        except grpc.RpcError as error:
            return health_of(error)
