"""Looks at the pool through the controller: samples for the decision, and who has the least to lose."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import grpc

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster import rpc
from cluster.clock import Clock, monotonic
from cluster.policies.autoscaler import Sample, Scaled

_CALL_S = 5.0
_LOOK_S = 1.0
_ROLES: dict[Scaled, inference_pb2.Role.ValueType] = {
    "attention": inference_pb2.ROLE_ATTENTION,
    "dense": inference_pb2.ROLE_DENSE,
}


class PoolWatch:
    """Owns what dense workers had computed at the last look, from which their busy share follows."""

    def __init__(self, channel: grpc.Channel, clock: Clock = monotonic) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(channel)
        self._clock = clock
        self._members: Sequence[inference_pb2.Member] = ()
        self._is_supervised = False
        self._computed_s: dict[tuple[str, int], float] = {}
        self._looked_s: float | None = None

    def look(self) -> Sample:
        """The pool now. Raises Unavailable and its like where the controller does not answer."""
        try:
            fleet = self._stub.GetFleet(control_pb2.GetFleetRequest(), timeout=_CALL_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        self._members = fleet.membership.members
        self._is_supervised = bool(fleet.slots)
        accounts = [member.load.blocks for member in self._members]
        capacity = sum(account.capacity for account in accounts)
        available = sum(account.free + account.sealed_cached for account in accounts)
        now_s = self._clock()
        return Sample(
            at_s=now_s,
            pool_share=1 - available / capacity if capacity else 0.0,
            waiting=sum(member.load.sequences_waiting for member in self._members),
            busy_share=self._busy_share(now_s),
            leaving=any(member.state == inference_pb2.MEMBER_STATE_DRAINING for member in self._members),
        )

    def idle_first(self, role: Scaled) -> list[str]:
        """The hosts (pods) of a role as of the last look, those with the least to lose first."""
        members = [member for member in self._members if member.role == _ROLES[role]]
        return [member.host for member in sorted(members, key=_to_lose)]

    def drain(self, pods: Sequence[str], within_s: float, stop: threading.Event) -> None:
        """Let the members in these pods hand over what they have, and wait until they have left; for so long
        at most. Where the controller supervises nobody, a pod's own end does that: this returns at once.
        """
        if not self._is_supervised:
            return
        leaving = sorted({member.slot for member in self._members if member.host in pods})
        end_s = self._clock() + within_s
        for worker_id in leaving:
            request = control_pb2.DrainRequest(worker_id=worker_id, grace_ms=int(within_s * 1000))
            try:
                self._stub.Drain(request, timeout=_CALL_S)
            except grpc.RpcError as error:
                raise rpc.from_rpc(error) from error
        while self._clock() < end_s and not stop.wait(_LOOK_S):
            self.look()
            if not any(member.slot in leaving for member in self._members):
                return

    def _busy_share(self, now_s: float) -> float | None:
        """The mean over the dense workers that were there at the last look too."""
        dense = [member for member in self._members if member.role == inference_pb2.ROLE_DENSE]
        computed_s = {(member.worker_id, member.epoch): member.load.busy_seconds for member in dense}
        before_s, self._computed_s = self._computed_s, computed_s
        looked_s, self._looked_s = self._looked_s, now_s
        grown = [seconds - before_s[life] for life, seconds in computed_s.items() if life in before_s]
        if looked_s is None or not grown or now_s <= looked_s:
            return None
        return min(1.0, sum(grown) / len(grown) / (now_s - looked_s))


def _to_lose(member: inference_pb2.Member) -> tuple[int, str]:
    blocks = member.load.blocks
    held = blocks.capacity - blocks.free - blocks.sealed_cached
    return held + member.load.sequences_running + member.load.sequences_waiting, member.worker_id
