"""One arena of an attention worker with its servers: the pool's service and the lanes, over one core."""

from __future__ import annotations

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.v1 import attention_pb2, attention_pb2_grpc, inference_pb2, kv_pb2, kv_pb2_grpc
from cluster import rpc
from cluster.config import Config
from cluster.policies.instances import slot_number
from cluster.telemetry import logger
from cluster.types import Epoch, KvGeometry, WorkerId, member_name
from workers.attention.core import AttentionCore
from workers.attention.kv_service import COPIES_MOST, KvService, account_message
from workers.attention.lane_service import LaneOffers, LaneService
from workers.lanes.agreement import TRANSPORTS, rows_most
from workers.lanes.server import LaneServer

_log = logger("attention")

_UNARY_THREADS = 2 * COPIES_MOST
_STALL_S = 10.0
"""A frame once begun, and a reply, must get through within this time."""

_SERVICES = (
    kv_pb2.DESCRIPTOR.services_by_name["KvService"].full_name,
    attention_pb2.DESCRIPTOR.services_by_name["AttentionService"].full_name,
)


class AttentionWorker:
    """Binds first, serves once it knows the model's geometry, drains at the end. A process has one for each
    of its arenas; they share nothing.

        bound --start(geometry)--> serving --drain--> draining --stop--> stopped

    The address is needed to register, and the answer to registering brings the geometry.
    """

    def __init__(
        self, config: Config, slot: WorkerId, epoch: Epoch, spin_s: float = 0.0, tier: int = 0
    ) -> None:
        """Bind the configured host. `spin_s`: how long lanes ask for messages before they sleep; `tier`:
        which of the slot's arenas this is.

        Raises ConfigError or Unavailable (`cluster.rpc.bind`).
        """
        self._config = config
        self._tier = config.attention.every_tier[tier]
        self._worker = member_name(slot, tier)
        self._epoch = epoch
        # A gRPC lane occupies a thread of the server for as long as it is open.
        self._server = rpc.server(_UNARY_THREADS + config.attention.max_lanes)
        first = config.port(config.attention.port, slot_number(slot) * len(config.attention.every_tier))
        wanted = first + tier if first else 0
        self.port = rpc.bind(self._server, config.attention.host, wanted, config.security)
        self._health = health.HealthServicer()
        self._core: AttentionCore | None = None
        self.lanes = LaneServer(config.attention.max_lanes, _STALL_S, spin_s=spin_s)

    @property
    def name(self) -> WorkerId:
        """Of the member that this is."""
        return self._worker

    @property
    def core(self) -> AttentionCore:
        """Arena and store, once started."""
        assert self._core is not None, "start comes first"
        return self._core

    def start(self, geometry: KvGeometry) -> None:
        """Form the arena and serve. Raises ConfigError when the arena cannot be had."""
        attention = self._config.attention
        self._core = AttentionCore(
            attention, self._tier, geometry, self._worker, self._epoch, emulation=self._config.emulation
        )
        kv_service = KvService(self._core.store, self._core.arena, self._config.security.tls)
        kv_pb2_grpc.add_KvServiceServicer_to_server(kv_service, self._server)
        offers = LaneOffers(self._listen(), rows_most(self._config, geometry))
        service = LaneService(self._core.store, self._core.session, self.lanes, offers)
        attention_pb2_grpc.add_AttentionServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._server.start()
        for name in ("", *_SERVICES):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _listen(self) -> dict[attention_pb2.LaneTransport.ValueType, str]:
        """Listen for each transport of the configuration; their addresses."""
        addresses = {}
        for name in self._config.lanes.transports:
            address = ""  # a gRPC lane comes to the server itself
            if name == "local":
                address = self.lanes.listen_unix()
            elif name == "tcp":
                host = self._config.attention.host
                address = f"{host}:{self.lanes.listen_tcp(host)}"
            addresses[TRANSPORTS[name]] = address
        return addresses

    def load(self) -> inference_pb2.Load:
        """What heartbeats report, without waiting for a turn at the store."""
        if self._core is None:
            return inference_pb2.Load()
        return inference_pb2.Load(
            blocks=account_message(self._core.account, self._core.arena.geometry),
            busy_seconds=self._core.busy_seconds,
        )

    def drain(self) -> None:
        """Take no new sequences; those held go on."""
        for name in _SERVICES:
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.core.store.draining = True

    def forsake(self) -> None:
        """Nobody is left who could use what is held: free it all. Does nothing before the start."""
        if self._core is not None:
            sequences = self._core.store.forsake()
            if sequences:
                _log.info("forsaken", sequences=sequences)

    def stop(self) -> None:
        """End lanes and calls. Idempotent."""
        self.lanes.close()
        self._server.stop(grace=0.5).wait(timeout=5.0)
        if self._core is not None:
            self._core.close()
