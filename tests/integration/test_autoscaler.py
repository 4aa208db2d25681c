"""The autoscaler between a controller and Kubernetes' API, both of them servers of the test's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from kubernetes import client

from anabranch.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import Fenced, NotFound, PermissionDenied, Unavailable
from cluster.policies.autoscaler import AutoscalerPolicy, Bounds, Scaled
from controller.autoscaling.loop import Autoscaler, Settings
from controller.autoscaling.pool_watch import PoolWatch
from controller.autoscaling.workloads import RayWorkerGroups, Scale, StatefulSets
from tests.kubernetes_server import Kubernetes, kubernetes, ray_cluster, stateful_set

AT_ONCE = AutoscalerPolicy(out_after_s=0, in_after_s=0, cool_down_s=0)
BOUNDS: Mapping[Scaled, Bounds] = {"attention": Bounds(1, 8)}


class Controller(control_pb2_grpc.ControlServiceServicer):
    """Says what members report."""

    def __init__(self) -> None:
        self.members: list[inference_pb2.Member] = []
        self.drained: list[str] = []
        self.slots: list[control_pb2.Slot] = []

    def GetFleet(
        self, _request: control_pb2.GetFleetRequest, _context: grpc.ServicerContext
    ) -> control_pb2.GetFleetResponse:
        """See control.proto."""
        membership = control_pb2.Membership(members=self.members)
        return control_pb2.GetFleetResponse(membership=membership, slots=self.slots)

    def Drain(
        self, request: control_pb2.DrainRequest, _context: grpc.ServicerContext
    ) -> control_pb2.DrainResponse:
        """See control.proto. The member leaves at once."""
        self.drained.append(request.worker_id)
        self.members = [member for member in self.members if member.slot != request.worker_id]
        return control_pb2.DrainResponse()

    def report(self, *used: int, busy_seconds: float = 0.0, waiting: int = 0) -> None:
        """Attention workers with so many of 100 blocks in use, and a dense worker."""
        self.members = [
            inference_pb2.Member(
                worker_id=f"attention-{index}",
                slot=f"attention-{index}",
                host=f"pod-{index}",
                role=inference_pb2.ROLE_ATTENTION,
                load=inference_pb2.Load(
                    blocks=inference_pb2.BlockAccount(capacity=100, free=100 - count, sealed_referenced=count)
                ),
            )
            for index, count in enumerate(used)
        ]
        load = inference_pb2.Load(busy_seconds=busy_seconds, sequences_waiting=waiting)
        dense = inference_pb2.Member(worker_id="dense-0", role=inference_pb2.ROLE_DENSE, load=load)
        self.members.append(dense)


@pytest.fixture
def controller() -> Iterator[tuple[Controller, grpc.Channel]]:
    """A controller, and the way to it."""
    service, server = Controller(), rpc.server(2)
    control_pb2_grpc.add_ControlServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with rpc.channel(f"127.0.0.1:{port}", TlsConfig()) as channel:
        yield service, channel
    server.stop(None).wait(5)


@contextmanager
def _sets(state: Kubernetes) -> Iterator[StatefulSets]:
    with client.ApiClient(client.Configuration(host=state.url)) as api:
        api.configuration.retries = False
        yield StatefulSets(api, "llm", {"attention": "river-attention", "dense": "river-dense"})


def test_a_set_is_resized_unless_somebody_else_was_faster() -> None:
    """The patch carries the version that was seen: after another change it is answered 409: Fenced."""
    path, found = stateful_set("river-attention", 2)
    with kubernetes((path, found)) as state, _sets(state) as sets:
        seen = sets.scale("attention")
        assert seen.count == 2
        sets.resize("attention", seen, 3, ())
        assert found["spec"]["replicas"] == 3
        with pytest.raises(Fenced, match="changed meanwhile"):
            sets.resize("attention", seen, 4, ())
        assert found["spec"]["replicas"] == 3


def test_what_kubernetes_refuses_is_said() -> None:
    """403 says whose right is missing, 404 what is not there, silence that nobody answered."""
    with kubernetes(stateful_set("river-attention", 2)) as state, _sets(state) as sets:
        state.refused = {"PATCH"}
        with pytest.raises(PermissionDenied, match=r"statefulset/river-attention.*403.*Role"):
            sets.resize("attention", sets.scale("attention"), 3, ())
        with pytest.raises(NotFound, match="river-dense"):
            sets.scale("dense")
        url = state.url
    with _sets(Kubernetes({}, url=url)) as sets, pytest.raises(Unavailable, match="does not answer"):
        sets.scale("attention")


def test_those_who_leave_are_named() -> None:
    """Of a StatefulSet the highest ordinals; of a RayCluster's group those with the least to lose."""
    with client.ApiClient(client.Configuration(host="http://127.0.0.1:1")) as api:
        sets = StatefulSets(api, "llm", {"attention": "river-attention"})
        groups = RayWorkerGroups(api, "llm", "river")
        seen = Scale(4, "10")
        assert sets.victims("attention", seen, 2, ["a", "b"]) == ["river-attention-3", "river-attention-2"]
        assert groups.victims("attention", seen, 3, ["a", "b"]) == ["a"]
        assert groups.victims("attention", seen, 5, ["a", "b"]) == []


def test_a_change_is_followed_over_watches_that_end() -> None:
    """A watch that Kubernetes ends is begun anew, until pods are as many as asked for and ready."""
    path, found = stateful_set("river-attention", 2)
    with kubernetes((path, found)) as state, _sets(state) as sets, ThreadPoolExecutor(1) as hands:
        state.ends_watches = True
        sets.resize("attention", sets.scale("attention"), 3, ())
        settled = hands.submit(sets.await_settled, "attention", 20.0, threading.Event())
        with state.changed:
            assert state.changed.wait_for(lambda: state.watches >= 2, 10)
        state.change(path, "status", observedGeneration=2, replicas=3, readyReplicas=2)
        assert not settled.done()
        state.change(path, "status", readyReplicas=3)
        assert settled.result(20)


def test_a_change_that_does_not_settle_is_not_followed_for_ever() -> None:
    """After its time the autoscaler goes on; nor does it hold up who wants to stop."""
    path, found = stateful_set("river-attention", 2)
    found["status"]["readyReplicas"] = 1
    stop = threading.Event()
    with kubernetes((path, found)) as state, _sets(state) as sets:
        state.ends_watches = True
        assert not sets.await_settled("attention", 0.5, stop)
        stop.set()
        assert not sets.await_settled("attention", 600, stop)


def test_a_worker_group_shrinks_by_the_pod_that_is_named() -> None:
    """Number and victim go in one patch; it holds while pods come and go, not after another change of the
    number.
    """
    path, found = ray_cluster("river", dense=1, attention=3)
    configuration = client.Configuration(host="")
    with kubernetes((path, found)) as state:
        configuration.host = state.url
        with client.ApiClient(configuration) as api:
            groups = RayWorkerGroups(api, "llm", "river")
            seen = groups.scale("attention")
            state.change(path, "status", readyWorkerReplicas=3)
            groups.resize("attention", seen, 2, ["river-attention-x"])
            dense, attention = found["spec"]["workerGroupSpecs"]
            assert dense == {"groupName": "dense", "replicas": 1}
            assert attention["replicas"] == 2
            assert attention["scaleStrategy"] == {"workersToDelete": ["river-attention-x"]}
            with pytest.raises(Fenced):
                groups.resize("attention", seen, 1, ["river-attention-y"])
            assert attention["replicas"] == 2


def _follow(state: Kubernetes, path: str) -> None:
    """Do as Kubernetes does when a number changes: pods come or leave, and it says so."""
    found = state.objects[path]
    with state.changed:
        assert state.changed.wait_for(lambda: found["metadata"]["generation"] > 1, 20)
    count = found["spec"]["replicas"]
    state.change(path, "status", observedGeneration=2, replicas=count, readyReplicas=count)


def test_a_full_pool_grows_when_that_is_allowed(controller: tuple[Controller, grpc.Channel]) -> None:
    """A dry run changes nothing; refused, the autoscaler tries again; allowed, the set grows as far as the
    share in use asks for.
    """
    service, channel = controller
    service.report(90, 90)
    path, found = stateful_set("river-attention", 2)
    stop = threading.Event()
    with kubernetes((path, found)) as state, _sets(state) as sets, ThreadPoolExecutor(2) as hands:
        dry = Autoscaler(Settings(BOUNDS, AT_ONCE), PoolWatch(channel), sets)
        dry.turn(stop)
        assert found["spec"]["replicas"] == 2
        state.refused = {"PATCH"}
        settings = Settings(BOUNDS, AT_ONCE, interval_s=0.05, applies=True)
        running = hands.submit(Autoscaler(settings, PoolWatch(channel), sets).run, stop)
        followed = hands.submit(_follow, state, path)
        with state.changed:
            assert state.changed.wait_for(lambda: state.refusals >= 2, 20)
        assert found["spec"]["replicas"] == 2
        state.refused = set()
        followed.result(20)
        stop.set()
        running.result(20)
        assert found["spec"]["replicas"] == 3


def test_an_empty_pool_loses_the_pod_with_the_least_in_it(
    controller: tuple[Controller, grpc.Channel],
) -> None:
    """The pod is named by what members report; its member drains before the pod ends, and the change is
    waited for before the next.
    """
    service, channel = controller
    service.report(30, 5, 20)
    service.slots = [control_pb2.Slot(worker_id=f"attention-{index}") for index in range(3)]
    path, found = ray_cluster("river", attention=3)
    configuration = client.Configuration(host="")
    with kubernetes((path, found)) as state, ThreadPoolExecutor(1) as hands:
        configuration.host = state.url
        with client.ApiClient(configuration) as api:
            groups = RayWorkerGroups(api, "llm", "river")
            autoscaler = Autoscaler(Settings(BOUNDS, AT_ONCE, applies=True), PoolWatch(channel), groups)
            turn = hands.submit(autoscaler.turn, threading.Event())
            with state.changed:
                assert state.changed.wait_for(lambda: found["metadata"]["generation"] > 1, 20)
            assert found["spec"]["workerGroupSpecs"][0]["scaleStrategy"] == {"workersToDelete": ["pod-1"]}
            assert service.drained == ["attention-1"]
            assert not turn.done()
            state.change(path, "status", observedGeneration=2, desiredWorkerReplicas=2, readyWorkerReplicas=2)
            turn.result(20)


def test_a_process_drains_as_a_whole_and_only_where_it_is_supervised(
    controller: tuple[Controller, grpc.Channel],
) -> None:
    """Once for all arenas of it. A controller that supervises nobody is not asked: Kubernetes would start the
    process anew, in the pod that is to go.
    """
    service, channel = controller
    service.report(30, 5)
    second = inference_pb2.Member(worker_id="attention-1.1", slot="attention-1", host="pod-1")
    service.members.append(second)
    watch, drained = PoolWatch(channel), []
    for slots in ([], [control_pb2.Slot(worker_id="attention-1")]):
        service.slots = slots
        watch.look()
        watch.drain(["pod-1"], 20.0, threading.Event())
        drained.append(list(service.drained))
    assert drained == [[], ["attention-1"]]


def test_a_dry_run_says_once_what_it_would_do(
    controller: tuple[Controller, grpc.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    """With the pods that would leave, and the reason; again when the number is another."""
    service, channel = controller
    path, found = stateful_set("river-attention", 3)
    caplog.set_level("INFO", logger="anabranch")
    with kubernetes((path, found)) as state, _sets(state) as sets:
        autoscaler = Autoscaler(Settings(BOUNDS, AT_ONCE), PoolWatch(channel), sets)
        for used in ((5, 5, 5), (6, 6, 6), (100, 100, 100)):
            service.report(*used)
            autoscaler.turn(threading.Event())
    told = [vars(record)["fields"] for record in caplog.records if record.message == "would_resize"]
    assert [(fields["was"], fields["count"]) for fields in told] == [(3, 2), (3, 4)]
    assert [fields["victims"] for fields in told] == [["river-attention-2"], []]


def test_the_busy_share_is_what_dense_workers_computed_since_the_last_look(
    controller: tuple[Controller, grpc.Channel],
) -> None:
    """Unknown at first; a worker that was not there before counts from its second look on."""
    service, channel = controller
    now = [100.0]
    watch = PoolWatch(channel, lambda: now[0])
    service.report(10, busy_seconds=5.0)
    assert watch.look().busy_share is None
    now[0] += 10
    service.report(10, busy_seconds=9.0, waiting=3)
    found = watch.look()
    assert found.busy_share == pytest.approx(0.4)
    assert found.pool_share == pytest.approx(0.1)
    assert found.waiting == 3
