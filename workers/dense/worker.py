"""A dense worker with its server: the engine, the gateways' service, and a local shard if there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from anabranch.v1 import control_pb2, dense_pb2, dense_pb2_grpc, inference_pb2, types_pb2
from anabranch.wire import sequence_key
from cluster import rpc
from cluster.config import Config
from cluster.config_values import Serves
from cluster.perfmodel import Line
from cluster.policies.instances import slot_number
from cluster.policies.prefixes import Find
from cluster.types import Epoch, KvGeometry, WorkerId
from workers.dense.admission import AdmissionLimits
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember, attention_members
from workers.dense.model import Decoder
from workers.dense.remote_peer import RemotePeer
from workers.dense.service import DenseService, Identity
from workers.kernels.select import select
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller
from workers.peer import AttentionPeer

_THREADS = 72
"""Each gateway's stream occupies one."""

_SERVICE = dense_pb2.DESCRIPTOR.services_by_name["DenseService"].full_name
_STOP_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class LocalArena:
    """A KV cache in this process: as a member now, its account a moment ago, how long it has worked in all,
    and how to speak to it.
    """

    member: Callable[[], AttentionMember]
    blocks: Callable[[], inference_pb2.BlockAccount]
    busy_s: Callable[[], float]
    peer: AttentionPeer


class DenseWorker:
    """Composes one dense worker, with an arena of its own where there is one.

    bound --start--> serving --drain--> handed over --stop--> stopped
    """

    def __init__(
        self,
        config: Config,
        decoder: Decoder,
        worker: WorkerId,
        epoch: Epoch,
        local: LocalArena | None = None,
        spin_s: float = 0.0,
        serves: Serves = "both",
        find: Find | None = None,
    ) -> None:
        """Bind the configured host. `spin_s`: how long lanes ask for replies before they sleep; `serves`: see
        `DenseConfig`; `find` asks the directory for prefixes.

        Raises ConfigError or Unavailable (`cluster.rpc.bind`).
        """
        self._config = config
        self._worker = worker
        self._local = local
        spec = decoder.spec
        self.geometry: KvGeometry = spec.geometry(config.model.dtype, config.attention.block_tokens)
        self._caller = Caller(
            worker,
            epoch,
            self.geometry,
            config.lanes.transports,
            rows_most(config, self.geometry),
            spin_s,
        )
        kernel = select("auto", config.dense.device)
        self.engine = Engine(config, decoder, kernel, self._connect, serves=serves, find=find)
        self._service = DenseService(
            self.engine,
            Identity(types_pb2.Responder(worker_id=worker, epoch=epoch), spec.digest),
            AdmissionLimits(
                spec.vocabulary_size, self.engine.max_sequence_length, config.gateway.default_deadline_ms
            ),
        )
        self._server = rpc.server(_THREADS)
        wanted = config.port(config.dense.port, slot_number(worker))
        self.port = rpc.bind(self._server, config.dense.host, wanted, config.security)
        self._health = health.HealthServicer()

    def start(self) -> None:
        """Serve gateways; attention workers come with `set_members`."""
        dense_pb2_grpc.add_DenseServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self.set_members(())
        self.engine.start()
        self._server.start()
        for name in ("", _SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def set_members(self, members: Iterable[inference_pb2.Member]) -> None:
        """Take the membership: attention workers that left starting are connected to."""
        known = attention_members(members, self._worker, self._config)
        if self._local is not None:
            known.append(self._local.member())
        self.engine.pool.update(known)

    def wait_connected(self, timeout_s: float) -> bool:
        """Until there is a lane to every attention worker known; False when that took too long.

        A worker that takes sequences over before would find nothing of theirs, and compute them again.
        """
        return self.engine.pool.wait_connected(timeout_s)

    def move(self, order: control_pb2.MoveOrder) -> None:
        """Begin a move that the controller planned, if the sequence runs here. Does not block."""
        source, target = WorkerId(order.source), WorkerId(order.target)
        self.engine.move(sequence_key(order.sequence), source, target, order.tokens)

    def load(self) -> inference_pb2.Load:
        """What heartbeats report."""
        return inference_pb2.Load(
            sequences_running=self.engine.sequences_running,
            sequences_waiting=self.engine.sequences_waiting,
            waiting_tokens=self.engine.waiting_tokens,
            step_times=_step_times(self.engine.step_times()),
            busy_seconds=self.engine.metrics.computed_s + (self._local.busy_s() if self._local else 0.0),
            blocks=self._local.blocks() if self._local is not None else None,
        )

    def drain(self) -> None:
        """Take nothing new and hand every sequence back, for another dense worker to take over: its KV
        lies elsewhere and stays.
        """
        self._health.set(_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.engine.refuse_new()
        self.engine.stop()
        self._service.end_streams()

    def stop(self) -> None:
        """End the engine and the streams. Idempotent."""
        self.engine.stop()
        self._server.stop(grace=_STOP_GRACE_S).wait(timeout=2 * _STOP_GRACE_S)

    def _connect(self, member: AttentionMember) -> AttentionPeer:
        if member.is_local:
            assert self._local is not None
            return self._local.peer
        return RemotePeer(member, self._caller, self._config.security.tls)


def _step_times(lines: tuple[Line, Line] | None) -> inference_pb2.StepTimes | None:
    if lines is None:
        return None
    dense, attention = lines
    return inference_pb2.StepTimes(
        dense_base_s=dense.base_s,
        dense_row_s=dense.each_s,
        attention_base_s=attention.base_s,
        attention_token_s=attention.each_s,
    )
