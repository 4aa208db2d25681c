"""The roles: which slots a configuration asks for, what each runs, and what it needs of a node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from anabranch.v1 import inference_pb2
from cluster.config import Config
from cluster.errors import ConfigError
from cluster.hardware import load_catalogue
from cluster.policies.node_placement import Demand, Offer, Unplaced, assign
from controller.keeper import CONFIG_PLACE, PYTHON_PLACE, Launch
from controller.slots import Node, NotPlaced, Order, Placed, Slot

ROLES = {
    "gateway": inference_pb2.ROLE_GATEWAY,
    "dense": inference_pb2.ROLE_DENSE,
    "attention": inference_pb2.ROLE_ATTENTION,
}

_MEMORY_MARGIN_BYTES = 384 * 2**20
"""What an attention worker needs beside its arena: the interpreter, torch, buffers of lanes."""

_TYPE_RESOURCE = "accelerator_type:"

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
    demand = _demand(config, slot, ())
    return Order(launch, demand.cpus, demand.gpus, demand.memory_bytes, tuple(demand.custom.items()))


def _demand(config: Config, slot: Slot, classes: tuple[str, ...]) -> Demand:
    """What a slot's process needs of a node; `classes`: hardware classes for its role, best first."""
    role, placement = slot.role, config.placement
    device = {"dense": config.dense.device, "attention": config.attention.device}.get(role, "cpu")
    chosen = {"dense": placement.dense_classes, "attention": placement.attention_classes}.get(role, ())
    return Demand(
        worker_id=slot.worker_id,
        role=role,
        cpus=_threads(config, role),
        gpus=1.0 if device == "cuda" else 0.0,
        memory_bytes=_memory_bytes(config, role),
        custom={f"anabranch_{role}": 1.0} if placement.exclusive else {},
        label=_label(placement.attention_label) if role == "attention" else None,
        classes=chosen or classes,
        only_classes=bool(chosen),
    )


def _memory_bytes(config: Config, role: str) -> int:
    """Host memory of a cache; what a model needs is not known before it is loaded."""
    if role == "attention" and config.attention.device == "cpu":
        return config.attention.arena + _MEMORY_MARGIN_BYTES
    if role == "dense" and config.dense.device == "cpu":
        return config.dense.local_arena
    return 0


def _label(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"placement.attention_label: {text}: key=value is expected")
    return key, value


def _threads(config: Config, role: str) -> int:
    return {"gateway": 1, "dense": config.dense.threads, "attention": config.attention.threads}[role]


def is_wildcard(host: str) -> bool:
    """Whether a server bound to this host listens on every interface."""
    return host in ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound)


class Placer:
    """Chooses nodes from what Ray offers; implements `controller.slots.Place`."""

    def __init__(self, config: Config, nodes: Callable[[], Sequence[Node]]) -> None:
        """Raises ConfigError for a catalogue, class or label that cannot be used."""
        placement = config.placement
        self._config = config
        self._nodes = nodes
        self._catalogue = load_catalogue(Path(placement.hardware) if placement.hardware else None)
        self._catalogue.require(placement.dense_classes)
        self._catalogue.require(placement.attention_classes)
        _label(placement.attention_label)

    def __call__(
        self, waiting: Sequence[Slot], occupied: Mapping[str, str], suspected: frozenset[str]
    ) -> Mapping[str, Placed | NotPlaced]:
        """An answer for each waiting slot."""
        roles = {slot.worker_id: slot.role for slot in slots(self._config)}
        counts = Counter((node, roles[worker_id]) for worker_id, node in occupied.items())
        demands = [_demand(self._config, slot, self._classes(slot.role)) for slot in waiting]
        answers = assign(demands, [self._offer(node) for node in self._nodes()], counts, suspected)
        return {
            worker_id: NotPlaced(answer.missing) if isinstance(answer, Unplaced) else Placed(answer)
            for worker_id, answer in answers.items()
        }

    def _classes(self, role: str) -> tuple[str, ...]:
        return self._catalogue.attention_rank() if role == "attention" else self._catalogue.dense_rank()

    def _offer(self, node: Node) -> Offer:
        available = node.available
        return Offer(
            node_id=node.node_id,
            hostname=node.hostname,
            hardware=self._catalogue.class_of(_accelerator(node)),
            cpus=available.get("CPU", 0.0),
            gpus=available.get("GPU", 0.0),
            memory_bytes=available.get("memory", 0.0),
            custom=available,
            labels=node.labels,
        )


def _accelerator(node: Node) -> str | None:
    """The accelerator type as Ray labels it, or as its resource names it."""
    labelled = node.labels.get("ray.io/accelerator-type")
    named = (name.removeprefix(_TYPE_RESOURCE) for name in node.total if name.startswith(_TYPE_RESOURCE))
    return labelled or next(named, None)
