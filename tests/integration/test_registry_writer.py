"""The controller's copy in a real Redis: away and back, full, taken over, and what a successor gets."""

import signal
from pathlib import Path

import pytest

from anabranch.v1 import control_pb2, inference_pb2
from cluster.errors import Fenced, NotFound, Unauthenticated
from cluster.registry.interface import MemberRecord, Registry
from cluster.types import Epoch, WorkerId
from controller.membership import RESTORED_GRACE_S
from controller.registry_writer import RegistryState
from tests.redis_server import BINARY, MISSING, LocalRedis, local_redis
from tests.registry_controller import EXPIRY_S, HEARTBEAT_S, Controller, noted_events

pytestmark = [pytest.mark.redis, pytest.mark.skipif(BINARY is None, reason=MISSING)]


@pytest.fixture
def first(server: LocalRedis, controllers: list[Controller]) -> Controller:
    """A controller with two members, written."""
    controllers.append(Controller(server, 1))
    controllers[0].begin()
    controllers[0].register("dense-0", 10)
    controllers[0].register("dense-1", 11)
    controllers[0].writer.write()
    return controllers[0]


def _written(registry: Registry) -> dict[str, int]:
    return {record.worker: record.epoch for record in registry.read().members}


def test_the_registry_follows_the_table(first: Controller) -> None:
    """Who joins, is replaced or leaves is written in the next round, with the table's version; loads are not
    written with each heartbeat.
    """
    assert _written(first.registry) == {"dense-0": 10, "dense-1": 11}
    first.register("dense-0", 20)
    first.table.remove("dense-1")
    first.writer.write()
    assert _written(first.registry) == {"dense-0": 20}
    assert first.registry.version() == first.table.membership().version
    assert first.registry.read().past == {"dense-0": (10,), "dense-1": (11,)}
    before = first.registry.read()
    first.beat("dense-0", 20, load=inference_pb2.Load(sequences_running=9))
    first.table.sweep()
    first.writer.write()
    assert first.registry.read() == before
    first.clock.advance(10)
    first.writer.write()
    body = first.registry.read().members[0].body
    assert control_pb2.RegisterRequest.FromString(body).member.load.sequences_running == 9


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_away_and_back(server: LocalRedis, first: Controller, how: str) -> None:
    """While the registry is away nobody expires; when it is back, and be it empty, it gets everything, and
    silence counts again. Each change of state is one line in the log, and the metric follows.
    """
    with noted_events("anabranch.registry") as events:
        if how == "frozen":
            server.signal(signal.SIGSTOP)
        else:
            server.kill()
        for _ in range(3):
            first.writer.write()
        assert (first.writer.state, first.up) == (RegistryState.AWAY, 0)
        assert first.pass_time(10 * EXPIRY_S) == []
        first.register("dense-2", 12)
        first.table.remove("dense-1")
        if how == "frozen":
            server.signal(signal.SIGCONT)
        else:
            server.start()
        for _ in range(2):
            first.writer.write()
        assert (first.writer.state, first.up) == (RegistryState.UP, 1)
        assert _written(first.registry) == {"dense-0": 10, "dense-2": 12}
        assert events == ["registry_state", "registry_up"]
        assert first.pass_time(EXPIRY_S) == []
        assert sorted(first.pass_time(HEARTBEAT_S)) == ["dense-0", "dense-2"]


def test_a_round_that_fails_does_not_end_the_next(first: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw counts as the registry's absence; the next round writes everything."""

    def fail() -> None:
        raise ValueError("a bug")

    first.register("dense-2", 12)
    with monkeypatch.context() as patch:
        patch.setattr(first.table, "registrations", fail)
        first.writer.write()
        assert (first.writer.state, first.up) == (RegistryState.AWAY, 0)
        assert first.pass_time(10 * EXPIRY_S) == []
    first.writer.write()
    assert (first.writer.state, first.up) == (RegistryState.UP, 1)
    assert _written(first.registry) == {"dense-0": 10, "dense-1": 11, "dense-2": 12}


def test_a_full_registry_is_away_for_writes_only(server: LocalRedis, first: Controller) -> None:
    """Out of memory: what was written is still read, silence still counts, since the registry answers; with
    room again everything is written.
    """
    with server.client() as client:
        client.config_set("maxmemory", "1")
        first.register("dense-2", 12)
        first.writer.write()
        assert (first.writer.state, first.up, first.writer.is_away) == (RegistryState.READ_ONLY, 0, False)
        assert _written(first.registry) == {"dense-0": 10, "dense-1": 11}
        client.config_set("maxmemory", "0")
    first.writer.write()
    assert (first.writer.state, first.up) == (RegistryState.UP, 1)
    assert _written(first.registry) == {"dense-0": 10, "dense-1": 11, "dense-2": 12}


def test_a_successor_knows_who_lived(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """Same ids and epochs at once; a heartbeat is told to register again; nobody expires before the grace."""
    first.register("dense-1", 21)
    first.writer.write()
    second = Controller(server, 2)
    controllers.append(second)
    second.begin()
    assert second.lives == {"dense-0": 10, "dense-1": 21}
    assert second.table.membership().version > first.table.membership().version
    for epoch in (10, 99):
        with pytest.raises(NotFound):
            second.beat("dense-0", epoch)
    with pytest.raises(Fenced):
        second.register("dense-1", 11)
    second.register("dense-0", 10)
    second.beat("dense-0", 10)
    assert second.pass_time(EXPIRY_S) == []
    assert second.pass_time(RESTORED_GRACE_S) == ["dense-0"]  # dense-1 is no process of this controller's
    assert second.lives == {"dense-1": 21}
    second.pass_time(HEARTBEAT_S)
    assert second.lives == {}


def test_a_successor_that_inherits_nothing_ends_who_lived(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """Where the processes ended with their controller, the registry says so."""
    second = Controller(server, 2, inherits=False)
    controllers.append(second)
    second.begin()
    assert second.lives == {}
    assert _written(first.registry) == {}


def test_members_of_another_configuration_are_not_taken_over(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """Who would be refused is not restored."""
    second = Controller(server, 2, digest="another")
    controllers.append(second)
    second.begin()
    assert second.lives == {}


def test_what_cannot_be_read_costs_nobody_else(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """A member's record that is no registration is left out, and written over or away."""
    broken = MemberRecord(WorkerId("dense-1"), Epoch(11), b"\xff\xff")
    first.registry.publish(Epoch(1), 9, [broken], ())
    second = Controller(server, 2)
    controllers.append(second)
    second.begin()
    assert second.lives == {"dense-0": 10}
    assert _written(second.registry) == second.lives


def test_the_registry_answers_late(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """A controller that started while the registry was away keeps who joined since, except lives that the
    registry knows to be over, and gets the rest when it answers.
    """
    first.register("dense-1", 21)
    first.writer.write()
    second = Controller(server, 2)
    controllers.append(second)
    server.signal(signal.SIGSTOP)
    second.begin()
    assert second.lives == {}
    second.register("dense-1", 11)
    second.register("dense-2", 12)
    server.signal(signal.SIGCONT)
    second.writer.write()
    assert second.lives == {"dense-0": 10, "dense-1": 21, "dense-2": 12}
    assert _written(second.registry) == second.lives


def test_a_controller_that_was_replaced_writes_no_more(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """It expires nobody either: it may be the one that is cut off. Its service hears of it, once."""
    second = Controller(server, 2)
    controllers.append(second)
    second.begin()
    first.table.remove("dense-0")
    for _ in range(2):
        first.writer.write()
    assert (first.writer.state, first.up) == (RegistryState.TAKEN, 0)
    assert (first.times_taken, second.times_taken) == (1, 0)
    assert first.pass_time(10 * EXPIRY_S) == []
    assert _written(second.registry) == {"dense-0": 10, "dense-1": 11}


def test_a_wrong_password_ends_the_start(tmp_path: Path, controllers: list[Controller]) -> None:
    """Only being away is no error."""
    with local_redis(tmp_path, password="secret") as server:
        server.password = "wrong"
        controllers.append(Controller(server, 1))
        with pytest.raises(Unauthenticated):
            controllers[0].writer.inherit()
