"""The membership as each process sees it: with addresses that lead through the network between them."""

from __future__ import annotations

import threading

from anabranch.cli.chaos.network import Network
from anabranch.v1 import control_pb2, inference_pb2
from controller.membership import MembershipTable, Terms


class SeenMembers(MembershipTable):
    """A membership table whose answers to a process name its own ways to the others; `membership` itself
    tells the plain addresses.
    """

    def __init__(self, terms: Terms, network: Network) -> None:
        super().__init__(terms)
        self._network = network
        self._viewers: dict[int, int] = {}
        self._silent_lock = threading.Lock()
        self._silent: set[int] = set()

    def register(self, request: control_pb2.RegisterRequest) -> control_pb2.Membership:
        """See `MembershipTable.register`."""
        self._viewers[request.member.epoch] = request.member.process_id
        return self._seen_by(request.member.epoch, super().register(request))

    def heartbeat(self, request: control_pb2.HeartbeatRequest) -> control_pb2.Membership | None:
        """See `MembershipTable.heartbeat`."""
        news = super().heartbeat(request)
        return None if news is None else self._seen_by(request.epoch, news)

    def sweep(self, *, frozen: bool = False) -> tuple[inference_pb2.Member, ...]:
        """See `MembershipTable.sweep`; who was silent is remembered for `taken_silent`."""
        silent = super().sweep(frozen=frozen)
        with self._silent_lock:
            self._silent |= {member.process_id for member in silent}
        return silent

    def taken_silent(self) -> set[int]:
        """Ids of processes that fell silent since this was last asked."""
        with self._silent_lock:
            silent, self._silent = self._silent, set()
        return silent

    def _seen_by(self, epoch: int, membership: control_pb2.Membership) -> control_pb2.Membership:
        viewer = self._viewers[epoch]
        seen = control_pb2.Membership()
        seen.CopyFrom(membership)  # which others are told, too
        for member in seen.members:
            member.address = self._network.way(viewer, member.process_id, member.address)
        return seen
