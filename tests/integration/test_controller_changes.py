"""Members whose controller goes, comes back knowing nobody, or is elsewhere."""

from __future__ import annotations

import queue

import pytest

from anabranch.v1 import inference_pb2
from cluster.config import Config
from tests.members import (
    DEADLINE_S,
    NAMES,
    Role,
    configured,
    controlling,
    member,
    starting,
)


def test_a_role_may_start_before_its_controller() -> None:
    """start() waits for the controller to appear."""
    config = configured()
    with controlling(config) as controller:
        port = controller.server.port
    role = Role(config, f"127.0.0.1:{port}")
    result = starting(role)
    with controlling(configured(port)) as controller:
        assert result.result(DEADLINE_S).responder.epoch == controller.epoch
        role.client.close()


def test_a_member_outlives_its_controller_and_finds_the_next() -> None:
    """While the controller is away the last known members stay; a new one, which knows nobody, is
    joined again without anybody's help.
    """
    config = configured()
    with controlling(config) as controller:
        port = controller.server.port
        role = Role(config, controller.address)
        role.client.start()
        role.await_members("dense-0")
    assert [each.worker_id for each in role.client.membership().members] == ["dense-0"]
    with controlling(configured(port)) as controller:
        role.client.set_state(inference_pb2.MEMBER_STATE_READY)
        controller.await_state("dense-0", inference_pb2.MEMBER_STATE_READY)
        assert controller.table.holds("dense-0", role.context.epoch)
        role.client.close()
    assert not role.fenced.is_set()


def test_members_outlive_a_controller_that_has_not_met_them() -> None:
    """Another life of the controller names only who joined it so far: the others stay members for the expiry
    and are gone then, which is told; a successor in a slot replaces who had it at once.
    """
    config = configured()
    with controlling(config) as controller:
        port = controller.server.port
        role = Role(config, controller.address, "dense-0")
        role.client.start()
        with member(config, controller.address, "dense-1"), member(config, controller.address, "dense-2"):
            lives = {each.worker_id: each.epoch for each in role.await_members(*NAMES).members}
    with controlling(configured(port)) as controller:
        controller.await_joined("dense-0")
        back = role.await_members(*NAMES)
        assert {each.worker_id: each.epoch for each in back.members} == lives
        with member(config, controller.address, "dense-1") as successor:
            while True:
                now = role.memberships.get(timeout=DEADLINE_S)
                assert [each.worker_id for each in now.members] == NAMES
                if now.members[1].epoch == successor.context.epoch:
                    break
            assert now.members[2].epoch == lives["dense-2"]
            last = role.await_members("dense-0", "dense-1")
            assert role.client.membership() == last
        role.client.close()


class ElsewhereReader:
    """Stands for the registry: fails in a way nobody foresaw, then says where the controller is."""

    controller = ""
    next_controller = ""
    failures = 0

    def __init__(self, _config: Config) -> None:
        pass

    def look(self, _known_version: int) -> None:
        """Nothing new but the controller's place."""
        if ElsewhereReader.failures < 2:
            ElsewhereReader.failures += 1
            raise ValueError("a record that nobody can read")
        self.controller = self.next_controller

    def close(self) -> None:
        """Nothing is open."""


def test_a_member_follows_its_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry says where the next controller is; a failure in asking it ends nothing, and whoever
    asks the controller for more hears where it answers.
    """
    monkeypatch.setattr("workers.membership.RegistryReader", ElsewhereReader)
    config = configured()
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    with controlling(config) as first, controlling(config) as second:
        monkeypatch.setattr(ElsewhereReader, "failures", 0)
        monkeypatch.setattr(ElsewhereReader, "next_controller", second.address)
        role = Role(config, first.address)
        role.client.set_follower(places.put)
        role.client.start()
        first.service.step_down()
        second.await_joined("dense-0")
        assert places.get(timeout=DEADLINE_S) == second.address
        assert ElsewhereReader.failures == 2
        role.client.close()
    assert places.empty()
    assert not role.fenced.is_set()
