"""Errors, TLS and binding over real gRPC servers."""

import asyncio
import multiprocessing
import os
import signal
import socket
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import grpc
import pytest

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from cluster import errors, rpc
from cluster.config import SecurityConfig, TlsConfig
from tests.certificates import authority
from tests.error_kinds import EVERY_KIND

PLAIN = SecurityConfig()


class Raising(control_pb2_grpc.ControlServiceServicer):
    """Raises the error it was given."""

    def __init__(self, error: errors.AnabranchError | None) -> None:
        self.error = error

    @rpc.unary
    def GetFleet(  # the name of the RPC
        self, request: control_pb2.GetFleetRequest, context: grpc.ServicerContext
    ) -> control_pb2.GetFleetResponse:
        """Raise, or answer."""
        if self.error:
            raise self.error
        return control_pb2.GetFleetResponse(stopping=True)


class RaisingStream(inference_pb2_grpc.InferenceServiceServicer):
    """Sends one event, then raises."""

    def __init__(self, error: errors.AnabranchError) -> None:
        self.error = error

    @rpc.aio_stream
    async def Generate(  # the name of the RPC
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """One event, then the error."""
        yield inference_pb2.GenerateResponse(request_id="one")
        raise self.error


def _serve(error: errors.AnabranchError | None, security: SecurityConfig = PLAIN) -> tuple[grpc.Server, int]:
    server = rpc.server(threads=2)
    control_pb2_grpc.add_ControlServiceServicer_to_server(Raising(error), server)
    port = rpc.bind(server, "127.0.0.1", 0, security)
    server.start()
    return server, port


def _ask(port: int, tls: TlsConfig, host: str = "localhost") -> control_pb2.GetFleetResponse:
    with rpc.channel(f"{host}:{port}", tls) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        return stub.GetFleet(control_pb2.GetFleetRequest(), timeout=10)


@pytest.fixture
def closing() -> Iterator[list[grpc.Server]]:
    """Servers to stop at the end of a test."""
    servers: list[grpc.Server] = []
    yield servers
    for server in servers:
        server.stop(0).wait(5)


@pytest.mark.parametrize("kind", EVERY_KIND, ids=lambda kind: kind.__name__)
def test_every_error_survives_a_unary_call(
    kind: type[errors.AnabranchError], closing: list[grpc.Server]
) -> None:
    """What a handler raises is what the caller's translation gives, message and kind."""
    server, port = _serve(kind("do this instead"))
    closing.append(server)
    with pytest.raises(grpc.RpcError) as caught:
        _ask(port, TlsConfig())
    translated = rpc.from_rpc(caught.value)
    assert type(translated) is kind
    assert translated.message == "do this instead"


def test_an_error_survives_an_asyncio_stream() -> None:
    """Events sent before the error arrive, then the error of the tree."""

    async def run() -> tuple[list[str], errors.AnabranchError]:
        server = grpc.aio.server(options=rpc.server_options())
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            RaisingStream(errors.ResourceExhausted("queue full")), server
        )
        port = rpc.bind(server, "127.0.0.1", 0, PLAIN)
        await server.start()
        seen: list[str] = []
        async with rpc.aio_channel(f"127.0.0.1:{port}", TlsConfig()) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            try:
                async for event in stub.Generate(inference_pb2.GenerateRequest(), timeout=10):
                    seen += [event.request_id]
            except grpc.RpcError as error:
                return seen, rpc.from_rpc(error)
            finally:
                await server.stop(0)
        raise AssertionError("the stream ended without its error")

    seen, error = asyncio.run(run())
    assert seen == ["one"]
    assert type(error) is errors.ResourceExhausted


def test_failures_inside_a_stream_translate_both_ways() -> None:
    """Code, reason and message stand for the same kind of error."""
    for kind in EVERY_KIND:
        error = kind("x")
        assert type(rpc.from_code(rpc.code_number(error), error.reason, error.message)) is kind
    assert type(rpc.from_code(99, "", "x")) is errors.Internal


def test_an_unreachable_peer_is_unavailable() -> None:
    """A refused connection becomes Unavailable."""
    with pytest.raises(grpc.RpcError) as caught:
        _ask(1, TlsConfig())
    assert type(rpc.from_rpc(caught.value)) is errors.Unavailable


def test_tls_serves_those_who_trust_it_and_nobody_else(tmp_path: Path, closing: list[grpc.Server]) -> None:
    """A client with the authority is served; a plain one and one without the authority are not."""
    tls = authority(tmp_path).tls("server")
    server, port = _serve(None, SecurityConfig(tls=tls))
    closing.append(server)
    assert _ask(port, TlsConfig(authority=tls.authority)).stopping
    (tmp_path / "other").mkdir()
    stranger = authority(tmp_path / "other").tls("stranger")
    for wrong in (TlsConfig(), TlsConfig(authority=stranger.authority)):
        with pytest.raises(grpc.RpcError) as caught:
            _ask(port, wrong)
        assert type(rpc.from_rpc(caught.value)) is errors.Unavailable


def test_mutual_tls_demands_a_certificate(tmp_path: Path, closing: list[grpc.Server]) -> None:
    """With `mutual`, a client without a certificate of the authority is refused."""
    signer = authority(tmp_path)
    server, port = _serve(None, SecurityConfig(tls=signer.tls("server", mutual=True)))
    closing.append(server)
    assert _ask(port, signer.tls("client")).stopping
    with pytest.raises(grpc.RpcError):
        _ask(port, TlsConfig(authority=str(tmp_path / "authority.pem")))


def test_a_member_that_is_reached_by_address_shows_its_name(
    tmp_path: Path, closing: list[grpc.Server]
) -> None:
    """`member_name` stands for an address that is not in the certificate, and for nothing else: another name
    is refused, and so is a host that is dialled by a name which the certificate lacks.
    """
    signer = authority(tmp_path)
    tls = signer.tls("server", hosts=["members.test"])
    server, port = _serve(None, SecurityConfig(tls=tls))
    closing.append(server)
    trusting = TlsConfig(authority=tls.authority)
    named = trusting.model_copy(update={"member_name": "members.test"})
    assert _ask(port, named, "127.0.0.1").stopping
    other = trusting.model_copy(update={"member_name": "others.test"})
    for wrong, host in ((trusting, "127.0.0.1"), (other, "127.0.0.1"), (named, "localhost")):
        with pytest.raises(grpc.RpcError) as caught:
            _ask(port, wrong, host)
        assert type(rpc.from_rpc(caught.value)) is errors.Unavailable


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::"])
def test_plain_text_beyond_loopback_is_refused(host: str) -> None:
    """Without TLS a server binds loopback only, unless told that it may."""
    with pytest.raises(errors.ConfigError, match="--insecure"):
        rpc.require_safe_bind(host, PLAIN)
    rpc.require_safe_bind(host, SecurityConfig(insecure=True))
    rpc.require_safe_bind("127.0.0.1", PLAIN)


def test_a_taken_port_is_named(closing: list[grpc.Server]) -> None:
    """Binding a port in use says which."""
    server, port = _serve(None)
    closing.append(server)
    second = grpc.server(futures.ThreadPoolExecutor(1), options=rpc.server_options())
    with pytest.raises(errors.Unavailable, match=str(port)):
        rpc.bind(second, "127.0.0.1", port, PLAIN)


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file is a configuration error that names it."""
    tls = TlsConfig(certificate=str(tmp_path / "gone.pem"), key=str(tmp_path / "gone.key"))
    with pytest.raises(errors.ConfigError, match=r"gone\."):
        rpc.server_credentials(tls)


class Endless(inference_pb2_grpc.InferenceServiceServicer):
    """Sends an event again and again, so that gRPC measures the connection with pings of its own."""

    def Generate(  # the name of the RPC
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        """One event after the other, with pauses where the request's name says so."""
        while context.is_active():
            yield inference_pb2.GenerateResponse(request_id="one")
            if request.request_id == "slow":
                sleep(0.03)


def _serve_for_ever(ports: "multiprocessing.SimpleQueue[int]") -> None:
    server = rpc.server(threads=2)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Endless(), server)
    ports.put(rpc.bind(server, "127.0.0.1", 0, PLAIN))
    server.start()
    server.wait_for_termination()


@pytest.mark.parametrize(("name", "events_before"), [("slow", 1), ("fast", 1000)])
def test_a_silent_server_is_left_when_its_time_is_over(name: str, events_before: int) -> None:
    """A process is frozen in the middle of a stream, or as it begins: the call breaks as UNAVAILABLE after
    the silence that its channel allows, not when the system gives the connection up, nor a second after what
    gRPC sent to measure the connection.
    """
    spawning = multiprocessing.get_context("spawn")
    ports = spawning.SimpleQueue()
    process = spawning.Process(target=_serve_for_ever, args=(ports,))
    process.start()
    try:
        with rpc.channel(f"127.0.0.1:{ports.get()}", TlsConfig(), silence_ms=600) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            events = stub.Generate(inference_pb2.GenerateRequest(request_id=name), timeout=40)
            for _ in range(events_before):
                next(events)
            sleep(0.01)  # what gRPC measures with is answered
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            frozen_s = monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                deque(events, maxlen=0)
            assert monotonic() - frozen_s < 1.2
        assert type(rpc.from_rpc(caught.value)) is errors.Unavailable  # and not DeadlineExceeded
    finally:
        process.kill()
        process.join()


def test_a_server_that_takes_no_connection_is_left_as_soon() -> None:
    """The system connects to a process that is frozen all the same: the call ends after the silence that its
    channel allows, and is not held for gRPC's 20 seconds.
    """
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        with (
            rpc.channel(f"127.0.0.1:{frozen.getsockname()[1]}", TlsConfig(), silence_ms=600) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            control_pb2_grpc.ControlServiceStub(channel).GetFleet(control_pb2.GetFleetRequest(), timeout=15)
    assert type(rpc.from_rpc(caught.value)) is errors.Unavailable  # and not DeadlineExceeded


def test_a_server_that_comes_back_is_found_as_soon(closing: list[grpc.Server]) -> None:
    """A channel that may be silent for little time does not wait for long between two attempts to connect,
    however many have failed.
    """
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    with rpc.channel(f"127.0.0.1:{port}", TlsConfig(), silence_ms=600) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        until_s = monotonic() + 3.0
        while monotonic() < until_s:
            with pytest.raises(grpc.RpcError):
                stub.GetFleet(control_pb2.GetFleetRequest(), timeout=5)
            sleep(0.05)
        server = rpc.server(threads=2)
        control_pb2_grpc.add_ControlServiceServicer_to_server(Raising(None), server)
        rpc.bind(server, "127.0.0.1", port, PLAIN)
        server.start()
        closing.append(server)
        back_s = monotonic()
        assert stub.GetFleet(control_pb2.GetFleetRequest(), timeout=5, wait_for_ready=True).stopping
        assert monotonic() - back_s < 0.8


def test_oversized_messages_are_refused(closing: list[grpc.Server]) -> None:
    """A message beyond the limit ends the call with RESOURCE_EXHAUSTED and leaves the server serving."""
    server = rpc.server(threads=2, message_bytes=1024)
    control_pb2_grpc.add_ControlServiceServicer_to_server(Raising(None), server)
    port = rpc.bind(server, "127.0.0.1", 0, PLAIN)
    server.start()
    closing.append(server)
    with rpc.channel(f"127.0.0.1:{port}", TlsConfig()) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Heartbeat(control_pb2.HeartbeatRequest(worker_id="x" * 4096), timeout=10)
        assert type(rpc.from_rpc(caught.value)) is errors.ResourceExhausted
        assert stub.GetFleet(control_pb2.GetFleetRequest(), timeout=10).stopping
