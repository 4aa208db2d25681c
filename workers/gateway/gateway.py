"""One gateway process: its servers, and the order in which things start and stop."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.v1 import control_pb2, inference_pb2, inference_pb2_grpc
from cluster import rpc
from cluster.config import Config
from cluster.telemetry import logger
from workers.gateway.callers import CallerDirectory
from workers.gateway.cost import CostMeter, CostMetrics
from workers.gateway.decoding import DecodingInterceptor
from workers.gateway.dense_link import GatewayIdentity
from workers.gateway.desk import Desk
from workers.gateway.http_api import HttpApi
from workers.gateway.http_server import HttpServer
from workers.gateway.metrics import GatewayMetrics
from workers.gateway.router import Router
from workers.gateway.served_model import ServedModel
from workers.gateway.service import InferenceService
from workers.gateway.text_work import TextWork
from workers.gateway.topology import Topology

_log = logger("gateway")

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
_STOP_GRACE_S = 1.0
_UNARY_CALLS_MAX = 256
"""Calls taken beside the streams; gRPC refuses more by itself."""


class Gateway:
    """Serves both public APIs for one model. Everything but text work runs on one event loop.

        created --start--> serving --drain--> draining --stop--> stopped

    Membership comes from outside (`set_membership`, on the loop): from the controller in a cluster,
    from a test in a test. The service name is ready in grpc.health.v1 while a dense worker is usable.
    """

    def __init__(self, config: Config, identity: GatewayIdentity, model: ServedModel, index: int = 0) -> None:
        """Must be called on the event loop. Raises ConfigError (API keys file), InvalidRequest (prices)."""
        self._config = config
        self._index = index
        self._membership = control_pb2.Membership()
        self.metrics = GatewayMetrics(model.name)
        self._router = Router(identity, config, self.metrics.resubmitted, self._update_health)
        callers = CallerDirectory(config.security.api_keys_file)
        self._work = TextWork()
        self.desk = Desk(model, config.gateway, callers, self._router, self.metrics, self._work)
        self._topology = Topology(self.desk, lambda: self._membership, config.security.tls)
        self.metrics.watch(config, lambda: self._membership, lambda: self.desk.streams_open)
        self._cost = CostMeter.of(config, lambda: self.metrics.tokens)
        if self._cost is not None:
            self.metrics.registry.register(CostMetrics(model.name, self._cost))
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self._server = self._build_server()
        api = HttpApi(self.desk, self._work, self.metrics, config.gateway, lambda: self.ready)
        self._http = HttpServer(config, api.routes())
        self.port = 0
        self.http_port: int | None = None

    @property
    def ready(self) -> bool:
        """Whether a new request would be served now."""
        return not self.desk.draining and self._router.usable

    def load(self) -> inference_pb2.Load:
        """What heartbeats report; may be called from any thread."""
        return inference_pb2.Load(streams_open=self.desk.streams_open)

    async def start(self) -> None:
        """Bind and serve. Raises Unavailable (port taken), ConfigError (plain text beyond loopback)."""
        gateway, security = self._config.gateway, self._config.security
        wanted = self._config.port(gateway.port, self._index)
        self.port = rpc.bind(self._server, gateway.host, wanted, security)
        await self._health.set(_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()
        if gateway.http_port is not None:
            wanted = self._config.port(gateway.http_port, self._index)
            self.http_port = await self._http.start(wanted)
        _log.info("gateway_serving", port=self.port, http_port=self.http_port)

    def set_membership(self, membership: control_pb2.Membership) -> None:
        """Learn who lives."""
        self._membership = membership
        if self._cost is not None:
            self._cost.set_membership(membership)
        self._router.set_membership(membership)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and finish the open ones; those left after `grace_s` are given up, to be
        resumed through another gateway.
        """
        _log.info("gateway_draining", streams=self.desk.streams_open)
        self.desk.draining = True
        self._update_health()
        await self.desk.drain(grace_s)

    async def stop(self) -> None:
        """End the servers and close every connection; drain first if streams should finish."""
        await self.drain(0.0)
        await asyncio.gather(self._http.stop(_STOP_GRACE_S), self._server.stop(_STOP_GRACE_S))
        await self._router.close()
        await self._topology.close()
        if self._health_task is not None:
            await self._health_task
        self._work.close()

    def _build_server(self) -> grpc.aio.Server:
        limits = self._config.gateway
        server = grpc.aio.server(
            interceptors=(DecodingInterceptor(_SERVICE),),
            options=rpc.server_options(limits.max_request_bytes, limits.connection_age_ms),
            maximum_concurrent_rpcs=2 * limits.max_streams + _UNARY_CALLS_MAX,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self.desk, self._topology), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _update_health(self) -> None:
        """Report readiness; several changes at once need one report."""
        if self._health_task is None or self._health_task.done():
            self._health_task = asyncio.get_running_loop().create_task(self._report_health())

    async def _report_health(self) -> None:
        states = health_pb2.HealthCheckResponse
        while True:
            ready = self.ready
            await self._health.set(_SERVICE, states.SERVING if ready else states.NOT_SERVING)
            if ready == self.ready:
                return
