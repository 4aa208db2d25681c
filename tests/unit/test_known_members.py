"""Whom a process takes for living while controllers change."""

from anabranch.v1 import control_pb2, inference_pb2
from workers.known_members import KnownMembers

EXPIRY_S = 10.0


def said(version: int, **epochs: int) -> control_pb2.Membership:
    """What a controller says: names with the epochs of their lives."""
    members = [inference_pb2.Member(worker_id=name, epoch=epoch) for name, epoch in epochs.items()]
    return control_pb2.Membership(version=version, members=members)


def living(known: KnownMembers) -> dict[str, int]:
    """Names and epochs, in order."""
    return {member.worker_id: member.epoch for member in known.membership.members}


def test_one_controller_is_believed_at_once() -> None:
    """Whom it names no longer is gone."""
    known = KnownMembers()
    known.learn(1, said(1, a=1, b=2), EXPIRY_S)
    known.learn(1, said(2, b=2), EXPIRY_S)
    assert living(known) == {"b": 2}
    assert known.let_go(1e9) == []


def test_another_one_has_time_to_meet_everybody() -> None:
    """Those it has not named stay until the time is over; a new life of a name takes it at once."""
    known = KnownMembers()
    known.learn(1, said(7, a=1, b=2, c=3), 0.0)
    known.learn(2, said(1, b=5), EXPIRY_S)
    assert living(known) == {"a": 1, "b": 5, "c": 3}
    assert known.membership.version == 1
    known.learn(2, said(2, b=5, c=3), EXPIRY_S)
    assert known.let_go(EXPIRY_S - 0.1) == []
    known.keep_until(EXPIRY_S + 1)
    assert known.let_go(EXPIRY_S) == []
    assert known.let_go(EXPIRY_S + 1) == ["a"]
    assert living(known) == {"b": 5, "c": 3}
