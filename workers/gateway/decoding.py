"""Requests that are not what their type says: refused as INVALID_ARGUMENT, like every other bad request.

gRPC itself would answer UNKNOWN where protobuf cannot parse a message, as for text that is not UTF-8.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands in a handler for the request that could not be parsed."""

    problem: str


def require_decoded(request: object) -> None:
    """Raise InvalidRequest for a stand-in."""
    if isinstance(request, Undecodable):
        raise InvalidRequest(f"the message cannot be parsed (is all text UTF-8?): {request.problem}")


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """Gives the handlers of one service a stand-in instead of gRPC an exception; they must call
    `require_decoded` first.
    """

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by gRPC for each call."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        deserializer = _lenient(handler.request_deserializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                handler.unary_stream, deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            handler.unary_unary, deserializer, handler.response_serializer
        )


def _lenient(deserializer: Callable[[bytes], object]) -> Callable[[bytes], object]:
    def decode(raw: bytes) -> object:
        try:
            return deserializer(raw)
        except DecodeError as error:
            return Undecodable(str(error))

    return decode
