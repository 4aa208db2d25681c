"""Whether a process serves, as its own gRPC server says.

The kubelet asks gRPC servers in plain text only, and without a certificate. So the metrics' port tells it,
over plain HTTP, what the server answers to one of its peers: over TLS, at the same address, by the same name.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2

from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import AnabranchError

HEALTH_CHECK = (
    "/grpc.health.v1.Health/Check",
    health_pb2.HealthCheckRequest.SerializeToString,
    health_pb2.HealthCheckResponse.FromString,
)
"""Method, serializer and deserializer: health's own stub does not tell its methods' types."""

_ANSWER_S = 4.0
"""Less than the kubelet waits, so that it hears why."""


@dataclass(frozen=True, slots=True)
class OwnHealth:
    """The health of this process's gRPC server at `address` (host:port)."""

    address: str
    tls: TlsConfig

    def problem(self, service: str) -> str:
        """Why a service is not served; nothing where it is. The service "" is the process as a whole."""
        try:
            with rpc.channel(self.address, self.tls) as channel:
                return self._ask(channel, service)
        except AnabranchError as error:
            return error.message

    def _ask(self, channel: grpc.Channel, service: str) -> str:
        check = channel.unary_unary(*HEALTH_CHECK)
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        is_served = answer.status == health_pb2.HealthCheckResponse.SERVING
        return "" if is_served else "not serving"
