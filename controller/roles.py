"""The roles: which slots a configuration asks for, what each runs, and what it needs of a node."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from anabranch.v1 import inference_pb2
from cluster.config import Config
from controller.keeper import CONFIG_PLACE, PYTHON_PLACE, Launch
from controller.slots import Node, NotPlaced, Order, Placed, Slot

ROLES = {
    "gateway": inference_pb2.ROLE_GATEWAY,
    "dense": inference_pb2.ROLE_DENSE,
    "attention": inference_pb2.ROLE_ATTENTION,
}

Command = Callable[[Slot, str], tuple[str, ...]]
"""The command of a slot's process, given the controller's address; see `keeper.Launch`."""


def slots(config: Config) -> tuple[Slot, ...]:
    """Every slot that should be filled, in the order in which they are placed."""
    counts = {
        "attention": config.attention.replicas,
        "dense": config.dense.replicas,
        "gateway": config.gateway.replicas,
    }
    return tuple(Slot(f"{role}-{i}", role, i) for role, count in counts.items() for i in range(count))


def module_command(slot: Slot, controller: str) -> tuple[str, ...]:
    """`python -m workers.ROLE ...`."""
    module = (PYTHON_PLACE, "-m", f"workers.{slot.role}")
    return (*module, *arguments(slot, controller))


def arguments(slot: Slot, controller: str) -> tuple[str, ...]:
    """What every role process is told."""
    identity = ("--worker-id", slot.worker_id, "--index", str(slot.index))
    return ("--config", CONFIG_PLACE, *identity, "--controller", controller)


def cpus(config: Config) -> int:
    """CPUs a private Ray cluster must claim so that every role fits."""
    return math.ceil(sum(order(config, slot, (), "").cpus for slot in slots(config)))


def order(config: Config, slot: Slot, command: tuple[str, ...], log_folder: str) -> Order:
    """The process of a slot and what it claims of its node."""
    threads = _threads(config, slot.role)
    environment = {
        # Ray sets its own figure for whatever it starts; a spinning thread starves its neighbours.
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    launch = Launch(slot.worker_id, command, config.to_yaml(), log_folder, environment)
    return Order(launch, cpus=threads)


def _threads(config: Config, role: str) -> int:
    return {"gateway": 1, "dense": config.dense.threads, "attention": config.attention.threads}[role]


def is_wildcard(host: str) -> bool:
    """Whether a server bound to this host listens on every interface."""
    return host in ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound)


class Placer:
    """Chooses nodes from what Ray offers; implements `controller.slots.Place`."""

    def __init__(self, config: Config, nodes: Callable[[], Sequence[Node]]) -> None:
        self._config = config
        self._nodes = nodes

    def __call__(
        self, waiting: Sequence[Slot], occupied: Mapping[str, str], suspected: frozenset[str]
    ) -> Mapping[str, Placed | NotPlaced]:
        """An answer for each waiting slot."""
        node = self._nodes()[0]
        return {slot.worker_id: Placed(node.node_id) for slot in waiting}
