"""The one place that builds gRPC servers and channels, and translates errors both ways.

Keep-alive settings of both sides stand in this file together: a client that pings more often than its
server allows gets a quiet call killed (`ENHANCE_YOUR_CALM`).
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from cluster import errors
from cluster.config import SecurityConfig, TlsConfig, is_loopback

_STATUS_DETAILS = "grpc-status-details-bin"
_DOMAIN = "anabranch"

_KEEPALIVE_MS = 20_000
SILENCE_MS = 30_000
"""A peer that does not answer for this long is given up, unless a channel says otherwise."""

_RECONNECT_MS = 2_000
"""Longest pause between two attempts to connect."""

_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
)
_SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 4),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)
DEFAULT_MESSAGE_BYTES = 64 * 2**20


def _sizes(message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
    ]


def channel_options(message_bytes: int, silence_ms: int, server_name: str | None) -> list[tuple[str, Any]]:
    """Options every channel of ours uses. The peer is asked after a third of the silence it is allowed; where
    that is often, only while a call is open. `server_name`: what the peer is called, and its certificate
    says, where its address does not.

    gRPC sends pings of its own, to measure, and none to keep alive while one of those is unanswered, for
    which their time limit is a minute unless told otherwise; nor within a second after any. Where the silence
    is short it does not measure. Who hears of a silence soon is as soon to see that a peer is back.
    """
    answer_ms = silence_ms - silence_ms // 3
    is_patient = silence_ms >= SILENCE_MS
    keepalive = [
        ("grpc.keepalive_permit_without_calls", int(is_patient)),
        ("grpc.http2.bdp_probe", int(is_patient)),
        ("grpc.keepalive_time_ms", silence_ms // 3),
        ("grpc.keepalive_timeout_ms", answer_ms),
        ("grpc.http2.ping_timeout_ms", answer_ms),
        ("grpc.min_reconnect_backoff_ms", silence_ms),  # what gRPC calls the time limit for connecting
        ("grpc.max_reconnect_backoff_ms", min(_RECONNECT_MS, max(100, silence_ms // 3))),
    ]
    named = [("grpc.default_authority", server_name)] if server_name else []
    return [*_CHANNEL_OPTIONS, *keepalive, *named, *_sizes(message_bytes)]


def _member_name(address: str, tls: TlsConfig) -> str | None:
    """What a peer's certificate must say where `address`, host:port, is an IP address."""
    try:
        ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None
    return tls.member_name


def server_options(
    message_bytes: int = DEFAULT_MESSAGE_BYTES, connection_age_ms: int | None = None
) -> list[tuple[str, Any]]:
    """Options every server of ours uses. Clients are told to connect anew when a connection is older than
    `connection_age_ms`; its calls are not cut, since gRPC sets them no time limit unless told one.
    """
    age = [("grpc.max_connection_age_ms", connection_age_ms)] if connection_age_ms is not None else []
    return [*_SERVER_OPTIONS, *age, *_sizes(message_bytes)]


def _read(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise errors.ConfigError(f"security.tls: {path} cannot be read: {error}") from error


def channel_credentials(tls: TlsConfig) -> grpc.ChannelCredentials | None:
    """Client credentials; None means plain text."""
    if not tls.enabled and tls.authority is None:
        return None
    return grpc.ssl_channel_credentials(_read(tls.authority), _read(tls.key), _read(tls.certificate))


def server_credentials(tls: TlsConfig) -> grpc.ServerCredentials | None:
    """Server credentials; None means plain text."""
    if not tls.enabled:
        return None
    pair = (_read(tls.key) or b"", _read(tls.certificate) or b"")
    return grpc.ssl_server_credentials([pair], _read(tls.authority), tls.mutual)


def channel(
    address: str,
    tls: TlsConfig,
    message_bytes: int = DEFAULT_MESSAGE_BYTES,
    silence_ms: int = SILENCE_MS,
    server_name: str | None = None,
) -> grpc.Channel:
    """A synchronous channel to host:port; its calls break when the peer has been silent for `silence_ms`."""
    credentials = channel_credentials(tls)
    options = channel_options(message_bytes, silence_ms, server_name or _member_name(address, tls))
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def aio_channel(
    address: str,
    tls: TlsConfig,
    message_bytes: int = DEFAULT_MESSAGE_BYTES,
    silence_ms: int = SILENCE_MS,
    server_name: str | None = None,
) -> grpc.aio.Channel:
    """An asyncio channel to host:port; its calls break when the peer has been silent for `silence_ms`."""
    credentials = channel_credentials(tls)
    options = channel_options(message_bytes, silence_ms, server_name or _member_name(address, tls))
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def server(threads: int, message_bytes: int = DEFAULT_MESSAGE_BYTES) -> grpc.Server:
    """A threaded server; streams occupy a thread each, so size it for them."""
    pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="rpc")
    return grpc.server(pool, options=server_options(message_bytes))


def bind(target: grpc.Server | grpc.aio.Server, host: str, port: int, security: SecurityConfig) -> int:
    """Bind a server and return its port.

    Raises ConfigError when plain text would be served beyond loopback without `security.insecure`,
    and Unavailable when the port is taken.
    """
    require_safe_bind(host, security)
    credentials = server_credentials(security.tls)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound = target.add_insecure_port(address)
        else:
            bound = target.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise errors.Unavailable(f"cannot bind {address}: is the port in use?") from error
    if bound == 0:
        raise errors.Unavailable(f"cannot bind {address}: is the port in use?")
    return bound


def require_safe_bind(host: str, security: SecurityConfig) -> None:
    """Refuse plain text beyond loopback unless the configuration says so."""
    if not (is_loopback(host) or security.tls.enabled or security.insecure):
        raise errors.ConfigError(
            f"refusing to serve plain text on {host}: configure security.tls, or pass --insecure "
            "(security.insecure: true) where the network is private"
        )


def to_status(error: errors.AnabranchError) -> status_pb2.Status:
    """The google.rpc.Status of an error, with ErrorInfo."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN, metadata=error.metadata)
    detail = any_pb2.Any()
    detail.Pack(info)
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=error.message, details=[detail])


def status_code(error: errors.AnabranchError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return grpc.StatusCode[error.status]


_BY_REASON: dict[str, type[errors.AnabranchError]] = {}
_BY_STATUS: dict[str, type[errors.AnabranchError]] = {}


def _index(kind: type[errors.AnabranchError]) -> None:
    _BY_REASON.setdefault(kind.reason, kind)
    _BY_STATUS.setdefault(kind.status, kind)
    for child in kind.__subclasses__():
        _index(child)


for _kind in errors.AnabranchError.__subclasses__():
    _index(_kind)


def from_parts(status: str, reason: str, message: str) -> errors.AnabranchError:
    """The error a status name, ErrorInfo reason and message stand for."""
    kind = _BY_REASON.get(reason) or _BY_STATUS.get(status) or errors.Internal
    return kind(message)


def code_number(error: errors.AnabranchError) -> int:
    """google.rpc.Code as a number, for failures inside a stream."""
    return int(code_pb2.Code.Value(error.status))


def from_code(code: int, reason: str, message: str) -> errors.AnabranchError:
    """The error of a failure inside a stream."""
    known = code in code_pb2.Code.values()
    return from_parts(code_pb2.Code.Name(code) if known else "INTERNAL", reason, message)


class _Call(Protocol):
    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Any: ...


def from_rpc(error: grpc.RpcError) -> errors.AnabranchError:
    """Translate what a stub raised; the cause is chained by the caller's `from`."""
    call = cast(_Call, error)  # every RpcError of a finished call is also a Call
    reason = ""
    for key, value in call.trailing_metadata() or ():
        if key == _STATUS_DETAILS:
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    reason = info.reason
    return from_parts(call.code().name, reason, call.details() or call.code().name)


def _abort_arguments(
    error: errors.AnabranchError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    details = ((_STATUS_DETAILS, to_status(error).SerializeToString()),)
    return status_code(error), error.message, details


def abort(context: grpc.ServicerContext, error: errors.AnabranchError) -> NoReturn:
    """End a synchronous call with an error of ours."""
    code, message, details = _abort_arguments(error)
    context.set_trailing_metadata(details)
    context.abort(code, message)
    raise AssertionError("abort returns never")


_S = TypeVar("_S")
_R = TypeVar("_R")
_A = TypeVar("_A")


def unary(
    method: Callable[[_S, _R, grpc.ServicerContext], _A],
) -> Callable[[_S, _R, grpc.ServicerContext], _A]:
    """Let a synchronous unary handler raise errors of the tree."""

    @functools.wraps(method)
    def handler(self: _S, request: _R, context: grpc.ServicerContext) -> _A:
        try:
            return method(self, request, context)
        except errors.AnabranchError as error:
            abort(context, error)

    return handler


def stream(
    method: Callable[[_S, _R, grpc.ServicerContext], Iterator[_A]],
) -> Callable[[_S, _R, grpc.ServicerContext], Iterator[_A]]:
    """Let a synchronous streaming handler raise errors of the tree."""

    @functools.wraps(method)
    def handler(self: _S, request: _R, context: grpc.ServicerContext) -> Iterator[_A]:
        try:
            yield from method(self, request, context)
        except errors.AnabranchError as error:
            abort(context, error)

    return handler


async def _abort_aio(context: grpc.aio.ServicerContext[Any, Any], error: errors.AnabranchError) -> NoReturn:
    code, message, details = _abort_arguments(error)
    await context.abort(code, message, details)
    raise AssertionError("abort returns never")


def aio_unary(
    method: Callable[[_S, _R, grpc.aio.ServicerContext[Any, Any]], Awaitable[_A]],
) -> Callable[[_S, _R, grpc.aio.ServicerContext[Any, Any]], Awaitable[_A]]:
    """Let an asyncio unary handler raise errors of the tree."""

    @functools.wraps(method)
    async def handler(self: _S, request: _R, context: grpc.aio.ServicerContext[Any, Any]) -> _A:
        try:
            return await method(self, request, context)
        except errors.AnabranchError as error:
            await _abort_aio(context, error)

    return handler


def aio_stream(
    method: Callable[[_S, _R, grpc.aio.ServicerContext[Any, Any]], AsyncIterator[_A]],
) -> Callable[[_S, _R, grpc.aio.ServicerContext[Any, Any]], AsyncIterator[_A]]:
    """Let an asyncio streaming handler raise errors of the tree."""

    @functools.wraps(method)
    async def handler(
        self: _S, request: _R, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[_A]:
        try:
            async for item in method(self, request, context):
                yield item
        except errors.AnabranchError as error:
            await _abort_aio(context, error)

    return handler
