"""The public gRPC API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import grpc

from anabranch.v1 import inference_pb2, inference_pb2_grpc
from cluster import rpc
from cluster.errors import AnabranchError, Internal
from cluster.telemetry import logger
from workers.gateway.callers import Caller
from workers.gateway.decoding import require_decoded
from workers.gateway.desk import Desk
from workers.gateway.topology import Topology

_log = logger("gateway.service")

_Context = grpc.aio.ServicerContext[Any, Any]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """See inference.proto. Messages over `max_request_bytes` never get here: gRPC answers them with
    RESOURCE_EXHAUSTED.
    """

    def __init__(self, desk: Desk, topology: Topology) -> None:
        self._desk = desk
        self._topology = topology

    @rpc.aio_stream
    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """See inference.proto."""
        caller = self._caller(request, context)
        live = await self._desk.open(request, caller, context.time_remaining())
        # The call may end while this generator is suspended in a `yield`: nobody would resume it.
        # (The cast: the stubs want a class of their own where gRPC takes any callable.)
        cast(Any, context).add_done_callback(lambda _context: live.close())
        try:
            while (event := await live.next_event()) is not None:
                yield event
        except AnabranchError:
            raise
        except Exception as error:
            _log.error("generate_failed", error=error, request_id=live.plan.request_id)
            raise Internal(f"a bug of the gateway: {error!r}") from error
        finally:
            live.close()

    @rpc.aio_unary
    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: _Context
    ) -> inference_pb2.TokenizeResponse:
        """See inference.proto."""
        self._caller(request, context)
        tokens = await self._desk.tokenize(request)
        return inference_pb2.TokenizeResponse(
            token_ids=tokens, max_sequence_length=self._desk.model.max_sequence_length
        )

    @rpc.aio_unary
    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: _Context
    ) -> inference_pb2.ListModelsResponse:
        """See inference.proto."""
        self._caller(request, context)
        served = self._desk.model
        model = inference_pb2.Model(
            name=served.name,
            architecture=served.spec.architecture,
            max_sequence_length=served.max_sequence_length,
            vocabulary_size=served.spec.vocabulary_size,
            parameters=served.spec.parameters,
            dilation=served.dilation,
        )
        return inference_pb2.ListModelsResponse(models=[model])

    @rpc.aio_unary
    async def GetTopology(
        self, request: inference_pb2.GetTopologyRequest, context: _Context
    ) -> inference_pb2.GetTopologyResponse:
        """See inference.proto."""
        caller = self._caller(request, context)
        request_id = request.request_id if request.HasField("request_id") else None
        return await self._topology.describe(request_id, caller)

    @rpc.aio_unary
    async def Abort(
        self, request: inference_pb2.AbortRequest, context: _Context
    ) -> inference_pb2.AbortResponse:
        """See inference.proto."""
        caller = self._caller(request, context)
        live = self._desk.find(request.request_id, caller)
        if live is not None:
            live.abort()
        return inference_pb2.AbortResponse(found=live is not None)

    def _caller(self, request: object, context: _Context) -> Caller:
        """What every call begins with, before it reads a field: `request` may be a stand-in without any.

        Raises InvalidRequest, Unauthenticated.
        """
        require_decoded(request)
        metadata = dict(context.invocation_metadata() or ())
        authorization = metadata.get("authorization")
        return self._desk.authenticate(str(authorization) if authorization is not None else None)
