"""Where Ray puts processes: five nodes on this machine with pretended GPUs, memory and labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.config import Config
from cluster.errors import Unplaceable
from controller.events import SlotChanged
from controller.slots import Phase
from tests.integration.clusters import DEADLINE_S, RunningCluster, configured, joining, running

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

MEMORY = {"anabranch-role": "memory"}


@dataclass
class Machines:
    """The pretended nodes by name: Ray's handles, and their ids."""

    cluster: Cluster
    nodes: dict[str, Any]

    def name_of(self, node_id: str) -> str:
        """Which machine a node id is."""
        return next(name for name, node in self.nodes.items() if node.node_id == node_id)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head, an L4, an H100, and two nodes set aside for memory."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
    )
    nodes = {"head": cluster.head_node}
    for name in ("L4", "H100"):
        labels = {"ray.io/accelerator-type": name}
        nodes[name] = cluster.add_node(num_cpus=2, num_gpus=1, labels=labels, memory=2**30)
    for name in ("memory-a", "memory-b"):
        nodes[name] = cluster.add_node(num_cpus=2, num_gpus=0, labels=MEMORY, memory=4 * 2**30)
    cluster.wait_for_nodes()
    yield Machines(cluster, nodes)
    cluster.shutdown()


def _config(folder: Path, machines: Machines, **settings: Any) -> Config:
    joined = {
        "ray__address": machines.cluster.address,
        "dense__device": "cuda",
        "attention__replicas": 2,
        "attention__arena": "1GiB",
    }
    return configured(folder, **(joined | settings))


def _places(cluster: RunningCluster, machines: Machines) -> dict[str, str]:
    """Where each slot was last started."""
    return {
        event.slot.worker_id: machines.name_of(event.slot.node)
        for event in cluster.events
        if isinstance(event, SlotChanged) and event.slot.phase is Phase.STARTING and event.slot.node
    }


def test_roles_go_where_their_hardware_is_and_leave_a_dead_node(machines: Machines, tmp_path: Path) -> None:
    """Dense on the GPU with the most FLOPS per dollar, attention spread over the memory nodes; when one of
    those dies its attention worker starts on the other, and nothing else moves.
    """
    with running(_config(tmp_path, machines), joining()) as cluster:
        cluster.await_ready()
        places = _places(cluster, machines)
        assert places["dense-0"] == "L4"
        assert {places["attention-0"], places["attention-1"]} == {"memory-a", "memory-b"}
        lost = next(name for name, place in places.items() if place == "memory-b")
        machines.cluster.remove_node(machines.nodes["memory-b"], allow_graceful=False)
        cluster.await_phase(lost, Phase.READY)
        after = _places(cluster, machines)
        assert after == {**places, lost: "memory-a"}
        assert cluster.end() == 0
    machines.nodes["memory-b"] = machines.cluster.add_node(
        num_cpus=2, num_gpus=0, labels=MEMORY, memory=4 * 2**30
    )


def test_the_configuration_overrides_the_catalogue(machines: Machines, tmp_path: Path) -> None:
    """`placement.dense_classes` names the hardware, whatever the catalogue prefers."""
    config = _config(tmp_path, machines, placement__dense_classes=("h100",), attention__replicas=1)
    with running(config, joining()) as cluster:
        cluster.await_ready()
        assert _places(cluster, machines)["dense-0"] == "H100"


def test_an_elastic_cluster_follows_its_nodes(machines: Machines, tmp_path: Path) -> None:
    """Three dense workers and two GPUs: the cluster is ready with two, and the third starts on the GPU that
    joins.
    """
    config = _config(tmp_path, machines, dense__replicas=3, attention__replicas=1, placement__elastic=True)
    with running(config, joining()) as cluster:
        cluster.await_ready()
        (waiting,) = {f"dense-{index}" for index in range(3)} - _places(cluster, machines).keys()
        labels = {"ray.io/accelerator-type": "L4"}
        late = machines.cluster.add_node(num_cpus=2, num_gpus=1, labels=labels, memory=2**30)
        cluster.await_phase(waiting, Phase.READY)
        assert cluster.end() == 0
    machines.cluster.remove_node(late)


def test_a_joined_cluster_is_left_as_it_was(machines: Machines, tmp_path: Path) -> None:
    """At the end our processes are gone and their claims returned; nodes of others' cluster live on."""
    with running(_config(tmp_path, machines, attention__replicas=1), joining()) as cluster:
        cluster.await_ready()
        names = [member.worker_id for member in cluster.controller.fleet().membership.members]
        processes = [cluster.member(name).process_id for name in names]
        assert cluster.end() == 0
    assert not [process for process in processes if Path(f"/proc/{process}").exists()]
    ray.init(address=machines.cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        deadline_s = time.monotonic() + DEADLINE_S
        while _free() != _all():
            assert time.monotonic() < deadline_s, f"{_free()} of {_all()} are free"
        assert sum(node["Alive"] for node in ray.nodes()) >= len(machines.nodes)
    finally:
        ray.shutdown()


def _free() -> tuple[float, float]:
    """CPUs and GPUs nobody claims."""
    free = ray.available_resources()
    return free.get("CPU", 0.0), free.get("GPU", 0.0)


def _all() -> tuple[float, float]:
    """CPUs and GPUs of the live nodes."""
    have = ray.cluster_resources()
    return have.get("CPU", 0.0), have.get("GPU", 0.0)


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"dense__replicas": 3}, "GPU"),
        ({"attention__arena": "64GiB"}, "GiB memory"),
        ({"placement__attention_label": "disk=fast"}, "disk=fast"),
        ({"placement__exclusive": True}, "anabranch_"),
    ],
    ids=["gpu", "memory", "label", "custom"],
)
def test_a_role_without_a_node_fails_naming_what_is_missing(
    machines: Machines, tmp_path: Path, settings: dict[str, Any], missing: str
) -> None:
    """No dense worker goes to a memory node for want of a GPU: with the default limits the start fails
    within 30 s, and says why.
    """
    began_s = time.monotonic()
    config = _config(tmp_path, machines, **settings)
    with running(config, joining()) as cluster:
        with pytest.raises(Unplaceable) as caught:
            cluster.status.result(DEADLINE_S)
        assert missing in caught.value.message
        assert time.monotonic() - began_s < 30
        places = _places(cluster, machines)
    dense = {place for worker, place in places.items() if worker.startswith("dense")}
    assert not dense & {"memory-a", "memory-b", "head"}
