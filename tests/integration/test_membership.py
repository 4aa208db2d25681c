"""Members and controller over real gRPC: joining, fencing, absence and return."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2, types_pb2
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import Cancelled, Fenced, NotFound, Unavailable, VersionMismatch
from cluster.types import LAYOUT_VERSION, WIRE_VERSION
from tests.members import (
    DEADLINE_S,
    Controller,
    Role,
    configured,
    controlling,
    member,
    starting,
)
from workers.membership import MembershipClient


def test_joining_teaches_everything_a_role_needs() -> None:
    """The answer holds the members, the rhythm, and the shape of the cache: no model folder needed."""
    config = configured()
    with controlling(config) as controller:
        role = Role(config, controller.address)
        welcome = role.client.start()
        role.client.close()
    assert [each.worker_id for each in welcome.membership.members] == ["dense-0"]
    assert welcome.membership.members[0].epoch == role.context.epoch
    assert welcome.heartbeat_ms == 50
    assert welcome.geometry == types_pb2.KvGeometry(
        layers=2,
        query_heads=4,
        kv_heads=2,
        head_size=16,
        data_type=types_pb2.DATA_TYPE_FLOAT32,
        block_tokens=32,
        digest="digest-of-the-model",
    )


def test_a_role_that_joined_was_told_the_members() -> None:
    """start() returns after on_change: nobody has to tell the role once more."""
    config = configured()
    told, going_on = threading.Event(), threading.Event()

    def take(_membership: control_pb2.Membership) -> None:
        told.set()
        going_on.wait(DEADLINE_S)

    with controlling(config) as controller:
        role = Role(config, controller.address)
        role.client = MembershipClient(
            role.context, inference_pb2.ROLE_DENSE, "127.0.0.1:9", inference_pb2.Load, take, role.fenced.set
        )
        result = starting(role)
        assert told.wait(DEADLINE_S)
        with pytest.raises(TimeoutError):
            result.result(0.2)
        going_on.set()
        result.result(DEADLINE_S)
        role.client.close()


def test_members_learn_of_each_other() -> None:
    """Who was there first hears of the newcomer with the next heartbeat, and when it is gone."""
    config = configured()
    with controlling(config) as controller, member(config, controller.address, "dense-0") as first:
        with member(config, controller.address, "dense-1") as second:
            second.await_members("dense-0", "dense-1")
            first.await_members("dense-0", "dense-1")
        controller.table.remove("dense-1")
        last = first.await_members("dense-0")
        assert first.client.membership() == last


def test_a_state_is_reported_at_once() -> None:
    """READY does not wait for the next heartbeat: that would come only in a minute here."""
    config = configured(heartbeat_ms=60_000)
    with controlling(config) as controller, member(config, controller.address) as role:
        role.client.set_state(inference_pb2.MEMBER_STATE_READY)
        controller.await_state("dense-0", inference_pb2.MEMBER_STATE_READY)


def test_the_load_reaches_the_others_with_resident_memory() -> None:
    """What a role reports of itself arrives; its memory is filled in for it."""
    config = configured()
    with controlling(config) as controller, member(config, controller.address):
        load = controller.table.membership().members[0].load
    assert load.sequences_running == 3
    assert 2**20 < load.resident_bytes <= load.resident_peak_bytes


def test_a_replaced_incarnation_is_told_so() -> None:
    """When another process takes the slot, the first one hears it, once, and cannot come back."""
    config = configured()
    with (
        controlling(config) as controller,
        member(config, controller.address) as first,
        member(config, controller.address) as second,
    ):
        assert first.fenced.wait(DEADLINE_S)
        assert controller.table.holds("dense-0", second.context.epoch)
        assert not second.fenced.is_set()


def test_a_fenced_process_cannot_join() -> None:
    """start() raises Fenced for an incarnation whose slot was taken."""
    config = configured()
    with controlling(config) as controller:
        role = Role(config, controller.address)
        role.client.start()
        role.client.close()
        controller.table.remove("dense-0")
        again = Role(config, controller.address, epoch=role.context.epoch)
        with pytest.raises(Fenced):
            again.client.start()
        again.client.close()


def test_another_configuration_is_refused_by_name() -> None:
    """A process started with another file does not join, and its error names the difference."""
    with controlling(configured()) as controller:
        role = Role(configured(dtype="bfloat16"), controller.address)
        with pytest.raises(VersionMismatch, match="configuration digest"):
            role.client.start()
        role.client.close()


def test_a_role_told_to_stop_does_not_wait_for_a_controller() -> None:
    """start() gives up when the process is told to stop."""
    config = configured()
    with controlling(config) as controller:
        address = controller.address
    role = Role(config, address)
    result = starting(role)
    role.context.stop.set()
    with pytest.raises(Cancelled):
        result.result(DEADLINE_S)
    role.client.close()


def test_a_callback_that_fails_does_not_make_a_live_process_look_dead() -> None:
    """The heartbeats go on when on_change raises."""
    config = configured()

    def fail(_membership: control_pb2.Membership) -> None:
        raise RuntimeError("a bug in the role")

    with controlling(config) as controller:
        role = Role(config, controller.address)
        client = MembershipClient(
            role.context, inference_pb2.ROLE_DENSE, "127.0.0.1:9", inference_pb2.Load, fail, role.fenced.set
        )
        client.start()
        client.set_state(inference_pb2.MEMBER_STATE_READY)
        controller.await_state("dense-0", inference_pb2.MEMBER_STATE_READY)
        client.close()


@contextmanager
def stub(controller: Controller) -> Iterator[control_pb2_grpc.ControlServiceStub]:
    """A bare stub, to say what no well-behaved member says."""
    with rpc.channel(controller.address, TlsConfig()) as channel:
        yield control_pb2_grpc.ControlServiceStub(channel)


def refusal(call: Any) -> Exception:
    """The error of a call that must fail."""
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return rpc.from_rpc(raised.value)


def test_a_heartbeat_for_another_controller_is_refused() -> None:
    """Whoever believes in another epoch registers again, and does not end; 0 believes nothing."""
    config = configured(heartbeat_ms=60_000)
    with controlling(config) as controller, member(config, controller.address) as role:
        beat = control_pb2.HeartbeatRequest(worker_id="dense-0", epoch=role.context.epoch)
        with stub(controller) as control:
            control.Heartbeat(beat, timeout=DEADLINE_S)
            beat.believed.epoch = controller.epoch
            control.Heartbeat(beat, timeout=DEADLINE_S)
            beat.believed.epoch = controller.epoch ^ 2
            assert isinstance(refusal(lambda: control.Heartbeat(beat, timeout=DEADLINE_S)), NotFound)


def test_an_unknown_member_is_told_to_register() -> None:
    """NOT_FOUND over the wire, whatever epoch of the controller it believed in."""
    with controlling(configured()) as controller, stub(controller) as control:
        beat = control_pb2.HeartbeatRequest(
            worker_id="dense-7", epoch=7, believed=types_pb2.Believed(epoch=99)
        )
        assert isinstance(refusal(lambda: control.Heartbeat(beat, timeout=DEADLINE_S)), NotFound)


def test_a_replaced_controller_sends_members_away() -> None:
    """Once another controller took over, nobody joins here, and no member is fenced."""
    config = configured()
    with controlling(config) as controller, stub(controller) as control:
        controller.service.step_down()
        beat = control_pb2.HeartbeatRequest(
            worker_id="dense-7", epoch=7, believed=types_pb2.Believed(epoch=99)
        )
        find = control_pb2.FindPrefixRequest(block_hashes=[bytes(32)])
        join = control_pb2.RegisterRequest(
            member=inference_pb2.Member(
                worker_id="dense-7", role=inference_pb2.ROLE_DENSE, epoch=7, address="127.0.0.1:9"
            ),
            wire_version=WIRE_VERSION,
            layout_version=LAYOUT_VERSION,
            config_digest=config.digest,
        )
        for call in (
            lambda: control.Register(join, timeout=DEADLINE_S),
            lambda: control.Heartbeat(beat, timeout=DEADLINE_S),
            lambda: control.FindPrefix(find, timeout=DEADLINE_S),
        ):
            assert isinstance(refusal(call), Unavailable)
        assert not controller.table.membership().members


def test_the_fleet_is_told_to_anyone() -> None:
    """GetFleet answers with members, slots and responder; Shutdown passes the grace on."""
    config = configured()
    with controlling(config) as controller, member(config, controller.address), stub(controller) as control:
        fleet = control.GetFleet(control_pb2.GetFleetRequest(), timeout=DEADLINE_S)
        assert [each.worker_id for each in fleet.membership.members] == ["dense-0"]
        assert [slot.worker_id for slot in fleet.slots] == ["dense-0"]
        assert fleet.responder.epoch == controller.epoch
        assert not fleet.stopping
        control.Shutdown(control_pb2.ShutdownRequest(grace_ms=1500), timeout=DEADLINE_S)
        assert controller.shutdowns == [1500]
        assert control.GetFleet(control_pb2.GetFleetRequest(), timeout=DEADLINE_S).stopping


@pytest.mark.parametrize("service", ["", "anabranch.v1.ControlService"])
def test_the_controller_says_that_it_is_healthy(service: str) -> None:
    """grpc.health.v1: the process is alive, the service is ready."""
    with controlling(configured()) as controller, rpc.channel(controller.address, TlsConfig()) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
