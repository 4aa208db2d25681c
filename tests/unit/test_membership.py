"""The membership table, on a clock that moves only when told."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from anabranch.v1 import control_pb2, inference_pb2
from cluster.clock import ManualClock
from cluster.errors import Fenced, InvalidRequest, NotFound, VersionMismatch
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId
from controller.membership import RESTORED_GRACE_S, MembershipTable, Terms

DIGEST = "digest-of-the-file"
HEARTBEAT_S = 0.5
EXPIRY_S = 2.5


class Cluster:
    """A table, its clock, and short ways to speak to it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.changed: list[tuple[str, int]] = []
        self.table = MembershipTable(
            Terms(DIGEST, int(HEARTBEAT_S * 1000), int(EXPIRY_S * 1000)), self.clock, self._note
        )

    def _note(self, member: inference_pb2.Member) -> None:
        self.changed.append((member.worker_id, member.state))

    def register(self, worker_id: str = "dense-0", epoch: int = 1, **facts: Any) -> control_pb2.Membership:
        """Join, as a dense worker unless told otherwise; `facts` replace what was agreed."""
        return self.table.register(registration(worker_id, epoch, **facts))

    def beat(
        self, worker_id: str = "dense-0", epoch: int = 1, **fields: Any
    ) -> control_pb2.Membership | None:
        """Give a sign of life."""
        return self.table.heartbeat(control_pb2.HeartbeatRequest(worker_id=worker_id, epoch=epoch, **fields))

    def pass_time(self, seconds: float) -> list[str]:
        """Sweep at every heartbeat interval, as the controller does; returns who fell silent."""
        silent: list[str] = []
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.advance(HEARTBEAT_S)
            silent += [member.worker_id for member in self.table.sweep()]
        return silent

    @property
    def names(self) -> list[str]:
        """Who lives."""
        return [member.worker_id for member in self.table.membership().members]


def registration(
    worker_id: str, epoch: int, *, role: Any = inference_pb2.ROLE_DENSE, **facts: Any
) -> control_pb2.RegisterRequest:
    """What a worker says when it joins."""
    agreed: dict[str, Any] = {
        "wire_version": WIRE_VERSION,
        "layout_version": LAYOUT_VERSION,
        "config_digest": DIGEST,
    }
    return control_pb2.RegisterRequest(
        member=inference_pb2.Member(worker_id=worker_id, role=role, epoch=epoch, address="127.0.0.1:1"),
        **agreed | facts,
    )


def test_a_member_that_joins_is_seen_by_all() -> None:
    """Registration returns everyone, the newcomer included, and raises the version."""
    cluster = Cluster()
    first = cluster.register("dense-0")
    second = cluster.register("attention-0", epoch=2)
    assert [member.worker_id for member in second.members] == ["attention-0", "dense-0"]
    assert second.version > first.version


@pytest.mark.parametrize(
    ("fact", "name"),
    [
        ({"wire_version": WIRE_VERSION + 1}, "wire version"),
        ({"layout_version": LAYOUT_VERSION + 1}, "block layout version"),
        ({"config_digest": "another"}, "configuration digest"),
    ],
)
def test_a_mismatch_is_refused_by_name(fact: dict[str, Any], name: str) -> None:
    """Whoever speaks another version or has another file is not admitted, and learns what differs."""
    cluster = Cluster()
    with pytest.raises(VersionMismatch, match=name):
        cluster.register(**fact)
    assert cluster.names == []


@pytest.mark.parametrize("name", ["worker_id", "role", "epoch", "address"])
def test_an_incomplete_member_is_refused(name: Literal["worker_id", "role", "epoch", "address"]) -> None:
    """A registration that lacks what others rely on is an invalid request that names the field."""
    request = registration("dense-0", 1)
    request.member.ClearField(name)
    with pytest.raises(InvalidRequest, match=name):
        Cluster().table.register(request)


def test_a_new_incarnation_fences_the_old_for_ever() -> None:
    """The slot goes to the newest incarnation; the old one can neither beat nor come back."""
    cluster = Cluster()
    cluster.register(epoch=1)
    cluster.register(epoch=2)
    assert cluster.beat(epoch=2) is not None
    with pytest.raises(Fenced):
        cluster.beat(epoch=1)
    with pytest.raises(Fenced):
        cluster.register(epoch=1)
    assert [member.epoch for member in cluster.table.membership().members] == [2]


def test_registering_twice_is_the_same_as_once() -> None:
    """A repeated registration (its answer was lost) keeps the incarnation in its slot."""
    cluster = Cluster()
    cluster.register(epoch=1)
    cluster.register(epoch=1)
    cluster.beat(epoch=1)
    assert cluster.names == ["dense-0"]


def test_an_unknown_member_is_told_to_register() -> None:
    """After a restart the controller knows nobody: the answer is NotFound, not Fenced."""
    with pytest.raises(NotFound):
        Cluster().beat()


def test_silence_beyond_the_expiry_is_death() -> None:
    """A member that beats stays; one that does not is removed once, and its epoch is fenced."""
    cluster = Cluster()
    cluster.register("dense-0", 1)
    cluster.register("dense-1", 2)
    silent: list[str] = []
    for _ in range(12):
        silent += cluster.pass_time(HEARTBEAT_S)
        cluster.beat("dense-0", 1)
    assert silent == ["dense-1"]
    assert cluster.names == ["dense-0"]
    with pytest.raises(Fenced):
        cluster.beat("dense-1", 2)
    with pytest.raises(Fenced):
        cluster.register("dense-1", 2)


def test_a_process_takes_all_its_members_along() -> None:
    """Whoever ends a slot's process ends the members of all its arenas, and no other slot's."""
    cluster = Cluster()
    cluster.register("attention-1", 7)
    for name, slot in (("attention-1.1", "attention-1"), ("attention-1.2", "attention-1"), ("x", "y")):
        request = registration(name, 7)
        request.member.slot = slot
        cluster.table.register(request)
    cluster.table.remove("attention-1")
    assert cluster.names == ["x"]
    with pytest.raises(Fenced):
        cluster.beat("attention-1.2", 7)


def test_a_member_is_not_expired_early() -> None:
    """Up to the expiry itself silence is tolerated."""
    cluster = Cluster()
    cluster.register()
    assert cluster.pass_time(EXPIRY_S) == []
    assert cluster.pass_time(HEARTBEAT_S) == ["dense-0"]


def test_the_controllers_own_pause_is_nobodys_silence() -> None:
    """A controller that was stopped for a minute does not take everyone for dead when it goes on."""
    cluster = Cluster()
    cluster.register()
    cluster.table.sweep()
    cluster.clock.advance(60.0)
    assert cluster.table.sweep() == ()
    assert cluster.pass_time(EXPIRY_S + HEARTBEAT_S) == ["dense-0"]


def test_the_membership_travels_only_when_it_changed() -> None:
    """A heartbeat that holds the current version gets no membership, an older one gets it whole."""
    cluster = Cluster()
    version = cluster.register().version
    assert cluster.beat(membership_version=version) is None
    cluster.register("dense-1", 2)
    news = cluster.beat(membership_version=version)
    assert news is not None
    assert len(news.members) == 2


def test_a_change_of_state_is_news_at_once() -> None:
    """READY reaches observers and raises the version without waiting for a sweep."""
    cluster = Cluster()
    version = cluster.register().version
    news = cluster.beat(state=inference_pb2.MEMBER_STATE_READY, membership_version=version)
    assert news is not None
    assert news.members[0].state == inference_pb2.MEMBER_STATE_READY
    assert cluster.changed[-1] == ("dense-0", inference_pb2.MEMBER_STATE_READY)


def test_loads_are_told_to_those_who_decide_by_them() -> None:
    """An attention worker hears who comes, goes or drains, and nothing of loads in between."""
    cluster = Cluster()
    cluster.register("dense-0")
    version = cluster.register("attention-0", 2, role=inference_pb2.ROLE_ATTENTION).version
    cluster.beat(load=inference_pb2.Load(sequences_running=1))
    cluster.table.sweep()
    assert cluster.beat("attention-0", 2, membership_version=version) is None
    told = cluster.beat(membership_version=version, load=inference_pb2.Load(sequences_running=1))
    assert told is not None
    cluster.beat(state=inference_pb2.MEMBER_STATE_DRAINING, membership_version=told.version)
    news = cluster.beat("attention-0", 2, membership_version=version)
    assert news is not None
    assert news.members[1].state == inference_pb2.MEMBER_STATE_DRAINING


def test_many_loads_are_told_less_often() -> None:
    """A thousand members whose loads always change are told to a hundred dense workers at a bounded rate."""
    cluster = Cluster()
    names = [f"dense-{number}" for number in range(100)]
    for number in range(900):
        cluster.register(f"attention-{number}", role=inference_pb2.ROLE_ATTENTION)
    for name in names:
        cluster.register(name)
    versions = dict.fromkeys(names, cluster.table.membership().version)
    told = 0
    for turn in range(20):
        cluster.pass_time(HEARTBEAT_S)
        for name in names:
            load = inference_pb2.Load(sequences_running=turn + 1)
            news = cluster.beat(name, load=load, membership_version=versions[name])
            if news is not None:
                versions[name] = news.version
                told += len(news.members)
        for number in range(900):
            cluster.beat(f"attention-{number}")
    assert 5 * 100_000 <= told <= 10 * 100_000


def test_loads_are_published_once_per_sweep() -> None:
    """Many loads cost one version; resident memory alone costs none."""
    cluster = Cluster()
    version = cluster.register().version
    for running in range(1, 5):
        cluster.beat(load=inference_pb2.Load(sequences_running=running), membership_version=version)
    assert cluster.table.membership().version == version
    cluster.table.sweep()
    news = cluster.beat(load=inference_pb2.Load(sequences_running=4), membership_version=version)
    assert news is not None
    assert news.version == version + 1
    assert news.members[0].load.sequences_running == 4
    cluster.beat(load=inference_pb2.Load(sequences_running=4, resident_bytes=7))
    cluster.table.sweep()
    assert cluster.table.membership().version == news.version


def test_an_ended_process_leaves_at_once() -> None:
    """A member known to be dead is gone without waiting for the expiry, and cannot come back."""
    cluster = Cluster()
    cluster.register(epoch=1)
    assert cluster.table.holds("dense-0", 1)
    cluster.table.remove("dense-0")
    cluster.table.remove("dense-0")
    assert cluster.names == []
    assert not cluster.table.holds("dense-0", 1)
    with pytest.raises(Fenced):
        cluster.register(epoch=1)


def test_what_the_table_hands_out_is_a_copy() -> None:
    """Nobody outside can change who lives."""
    cluster = Cluster()
    cluster.register().members[0].worker_id = "somebody-else"
    assert cluster.names == ["dense-0"]


def test_nobody_falls_silent_while_time_is_frozen() -> None:
    """What passes in frozen sweeps is nobody's silence, and ends no earlier silence either."""
    cluster = Cluster()
    cluster.register()
    assert cluster.pass_time(EXPIRY_S) == []
    for _ in range(100):
        cluster.clock.advance(HEARTBEAT_S)
        assert cluster.table.sweep(frozen=True) == ()
    assert cluster.pass_time(HEARTBEAT_S) == ["dense-0"]


def test_what_an_earlier_controller_knew_is_a_member_until_it_speaks() -> None:
    """Restored members are named at once and asked to register again; past lives stay past."""
    cluster = Cluster()
    before = [registration("dense-0", 10), registration("dense-1", 11)]
    cluster.register("dense-1", 21)
    assert cluster.table.restore(before, {WorkerId("dense-0"): [Epoch(9)]}, version=70) == 1
    membership = cluster.table.membership()
    assert [(each.worker_id, each.epoch) for each in membership.members] == [("dense-0", 10), ("dense-1", 21)]
    assert membership.version == 71
    with pytest.raises(NotFound):
        cluster.beat("dense-0", 10)
    with pytest.raises(Fenced):
        cluster.register("dense-0", 9)
    cluster.register("dense-0", 10)
    cluster.beat("dense-0", 10)


def test_a_life_that_ended_under_an_earlier_controller_does_not_stay() -> None:
    """Who registered before the table heard that this life is over, leaves when it does."""
    cluster = Cluster()
    cluster.register("dense-0", 10)
    cluster.table.restore([registration("dense-0", 12)], {WorkerId("dense-0"): [Epoch(10)]}, version=1)
    assert [each.epoch for each in cluster.table.membership().members] == [12]
    with pytest.raises(NotFound):
        cluster.beat("dense-0", 12)
    with pytest.raises(Fenced):
        cluster.beat("dense-0", 10)


def test_a_restored_member_that_never_speaks_leaves_after_its_grace() -> None:
    """It is nobody's process here: the sweep that ends it returns it to nobody."""
    cluster = Cluster()
    cluster.table.restore([registration("dense-0", 10)], {}, version=1)
    assert cluster.pass_time(RESTORED_GRACE_S + EXPIRY_S) == []
    assert cluster.names == ["dense-0"]
    assert cluster.pass_time(HEARTBEAT_S) == []
    assert cluster.names == []


def test_registrations_are_what_another_table_restores() -> None:
    """A table's own account of its members, condition and load included, builds an equal table."""
    cluster, other = Cluster(), Cluster()
    cluster.register("dense-0", 10)
    cluster.beat("dense-0", 10, load=inference_pb2.Load(sequences_running=2))
    version, registrations = cluster.table.registrations()
    other.table.restore(registrations, {}, version)
    assert list(other.table.membership().members) == list(cluster.table.membership().members)


def test_a_process_is_told_how_long_it_has_to_leave() -> None:
    """All members of its slot, and the first time counts; another life of it may stay. The last one of a
    role that stays is not told to go, nor is somebody unknown.
    """
    cluster = Cluster()
    for name, slot in (("a-0", "a-0"), ("a-0.1", "a-0"), ("a-1", "a-1")):
        request = registration(name, 1, role=inference_pb2.ROLE_ATTENTION)
        request.member.slot = slot
        cluster.table.register(request)
    cluster.table.drain("a-0", 60.0)
    cluster.clock.advance(20.0)
    cluster.table.drain("a-0", 60.0)
    assert [cluster.table.left_s(name) for name in ("a-0", "a-0.1", "a-1")] == [40.0, 40.0, None]
    with pytest.raises(InvalidRequest, match="last attention"):
        cluster.table.drain("a-1", 60.0)
    with pytest.raises(NotFound, match="a-7"):
        cluster.table.drain("a-7", 60.0)
    cluster.clock.advance(50.0)
    assert cluster.table.left_s("a-0") == 0.0
    cluster.register("a-0", 2, role=inference_pb2.ROLE_ATTENTION)
    assert cluster.table.left_s("a-0") is None
    cluster.beat("a-0", 2, state=inference_pb2.MEMBER_STATE_DRAINING)
    with pytest.raises(InvalidRequest, match="last attention"):
        cluster.table.drain("a-1", 60.0)
    cluster.table.dismiss("a-1", 5.0)  # by who supervises it, and may
    assert cluster.table.left_s("a-1") == 5.0
