"""A dense worker with its server: the engine, `DenseService`, health, reflection and load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.v1 import dense_pb2, dense_pb2_grpc, inference_pb2
from cluster import rpc
from cluster.config import Config
from cluster.types import Epoch, KvGeometry, WorkerId
from workers.dense.admission import AdmissionLimits
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.remote_peer import RemotePeer
from workers.dense.service import DenseService, Identity
from workers.kernels.select import select
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller
from workers.peer import AttentionPeer

_UNARY_THREADS = 4
_GATEWAYS_MOST = 64
"""Streams at once; each occupies a thread."""

_SERVICE = dense_pb2.DESCRIPTOR.services_by_name["DenseService"].full_name


class DenseWorker:
    """Binds first, serves once the model is loaded and the pool is known, drains at the end.

        bound --start(decoder)--> serving --drain--> draining --stop--> stopped

    `local` is an attention worker in this process, as member and peer.
    """

    def __init__(
        self,
        config: Config,
        worker: WorkerId,
        epoch: Epoch,
        local: tuple[AttentionMember, AttentionPeer] | None = None,
    ) -> None:
        """Bind the configured host. Raises ConfigError or Unavailable (`cluster.rpc.bind`)."""
        self._config = config
        self._worker = worker
        self._epoch = epoch
        self._local = local
        self._server = rpc.server(_UNARY_THREADS + _GATEWAYS_MOST)
        self.port = rpc.bind(self._server, config.dense.host, 0, config.security)
        self._health = health.HealthServicer()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, once started."""
        assert self._engine is not None, "start comes first"
        return self._engine

    def start(self, decoder: Decoder) -> None:
        """Serve a model."""
        config, spec = self._config, decoder.spec
        geometry = spec.geometry(config.model.dtype, config.attention.block_tokens)
        kernel = select(config.attention.kernel, config.dense.device)
        engine = Engine(config, decoder, kernel, partial(self._connect, geometry))
        self._engine = engine
        limits = AdmissionLimits(spec.vocabulary_size, engine.max_sequence_length)
        identity = Identity(self._worker, self._epoch, spec.digest)
        service = DenseService(engine, identity, limits, config.gateway.default_deadline_ms)
        dense_pb2_grpc.add_DenseServiceServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        engine.start()
        self.update(())
        self._server.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def update(self, members: Sequence[AttentionMember]) -> None:
        """Membership changed."""
        local = (self._local[0],) if self._local is not None else ()
        self.engine.pool.update((*members, *local))

    def load(self) -> inference_pb2.Load:
        """What heartbeats report."""
        if self._engine is None:
            return inference_pb2.Load()
        return inference_pb2.Load(
            sequences_running=self._engine.sequences_running,
            sequences_waiting=self._engine.sequences_waiting,
        )

    def drain(self) -> None:
        """Take no new sequences; those that live go on."""
        self._health.set(_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.engine.refuse_new()

    def stop(self) -> None:
        """Hand what lives back to the gateways and end. Idempotent."""
        if self._engine is not None:
            self._engine.stop()
        self._server.stop(grace=1.0).wait(timeout=5.0)

    def _connect(self, geometry: KvGeometry, member: AttentionMember) -> AttentionPeer:
        if self._local is not None and member.is_local:
            return self._local[1]
        caller = Caller(
            self._worker,
            self._epoch,
            geometry,
            self._config.lanes.transports,
            rows_most(self._config, geometry),
        )
        return RemotePeer(member, caller, self._config.security.tls)
