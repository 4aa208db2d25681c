"""The gateways a client knows, and how it speaks to them: what both clients share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2

from anabranch.addresses import Addresses, Gateway, Resolve
from anabranch.answers import Health
from anabranch.failover import Failover, is_interruption
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import DeadlineExceeded
from cluster.rpc import DEFAULT_MESSAGE_BYTES

_INFERENCE_SERVICE = "anabranch.v1.InferenceService"

SILENCE_S = 3.0
"""Longer than a large prompt keeps a slow network's pings waiting. A stream that is left too early costs a
resumption, of which a request has some two hundred.
"""

HEALTH_TIMEOUT_S = 5.0
"""Longest wait for one gateway's answer about its health."""


class Gateways:
    """Immutable settings of a client, its gateways' addresses, and a turn that moves on with each call.

    `timeout_s` is the deadline of a call that names none; `outage_s` how long no gateway may answer;
    `silence_s` after how long one that does not even answer to pings is left for the next.
    """

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        api_key: str | None,
        tls: TlsConfig | None,
        timeout_s: float,
        outage_s: float,
        silence_s: float,
        resolve: Resolve,
    ) -> None:
        self.addresses = Addresses((addresses,) if isinstance(addresses, str) else addresses, resolve)
        self.tls = tls or TlsConfig()
        self.metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self.message_bytes = DEFAULT_MESSAGE_BYTES
        self.timeout_s = timeout_s
        self._outage_s = outage_s
        self.silence_ms = max(1, round(1000 * silence_s))
        self._turns = itertools.count()

    def failover(self, timeout_s: float | None = None) -> Failover:
        """The attempts of one call over all gateways; each call begins at the next one."""
        return Failover(
            self.addresses.known,
            first=next(self._turns),
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            outage_s=self._outage_s,
        )

    def once(self, gateway: Gateway) -> Failover:
        """A single attempt at one gateway."""
        return Failover(lambda: (gateway,), timeout_s=self.timeout_s, outage_s=0.0)


def health_request() -> health_pb2.HealthCheckRequest:
    """Asks whether a gateway serves, not only whether it lives."""
    return health_pb2.HealthCheckRequest(service=_INFERENCE_SERVICE)


def health_of(answer: health_pb2.HealthCheckResponse | grpc.RpcError) -> Health:
    """What an answer, or the failure to get one, says of a gateway."""
    if isinstance(answer, grpc.RpcError):
        silent = is_interruption(answer) or isinstance(rpc.from_rpc(answer), DeadlineExceeded)
        return Health.UNREACHABLE if silent else Health.NOT_READY
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    return Health.READY if serving else Health.NOT_READY
