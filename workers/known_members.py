"""Whom a process takes for living, from what one controller after the other says. Pure."""

from __future__ import annotations

from anabranch.v1 import control_pb2, inference_pb2


class KnownMembers:
    """The membership as last heard, and who is kept beside it.

    Another life of the controller may know nobody yet: whom it does not name stays a member here for a while
    after it was joined, unless another life takes that name.
    """

    def __init__(self) -> None:
        self.membership = control_pb2.Membership()
        """Everyone taken for living; never modified in place."""
        self._kept: dict[str, inference_pb2.Member] = {}
        self._kept_until_s = 0.0
        self._heard_from = 0

    def learn(self, controller: int, said: control_pb2.Membership, keep_until_s: float) -> None:
        """What a life of the controller said; should it be another one, those before are kept until then."""
        if self._heard_from not in (0, controller):
            self._kept = {member.worker_id: member for member in self.membership.members}
            self._kept_until_s = keep_until_s
        self._heard_from = controller
        for member in said.members:
            self._kept.pop(member.worker_id, None)
        members = sorted((*said.members, *self._kept.values()), key=_name)
        self.membership = control_pb2.Membership(version=said.version, members=members)

    def keep_until(self, time_s: float) -> None:
        """The controller was joined: those who have to do that as well have until then."""
        self._kept_until_s = time_s

    def let_go(self, now_s: float) -> list[str]:
        """Whom the controller has not named by now is gone; their names. To be asked only when it answered:
        while it is away, nobody could have joined it.
        """
        if not self._kept or now_s < self._kept_until_s:
            return []
        gone, self._kept = sorted(self._kept), {}
        members = [member for member in self.membership.members if member.worker_id not in gone]
        self.membership = control_pb2.Membership(version=self.membership.version, members=members)
        return gone


def _name(member: inference_pb2.Member) -> str:
    return member.worker_id
