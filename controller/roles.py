"""The roles: which slots a configuration asks for, and what each runs."""

from __future__ import annotations

from collections.abc import Callable

from anabranch.v1 import inference_pb2
from cluster.config import Config
from cluster.policies.node_placement import Role, RoleDemand
from controller.keeper import CONFIG_PLACE, PYTHON_PLACE, Launch
from controller.slots import Order, Slot

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
    counts: dict[Role, int] = {
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


def order(config: Config, slot: Slot, demand: RoleDemand, command: tuple[str, ...], log_folder: str) -> Order:
    """The process of a slot, claiming of its node what it demands."""
    environment = {
        # Ray sets its own figure for whatever it starts; a spinning thread starves its neighbours.
        "OMP_NUM_THREADS": str(max(1, int(demand.cpus))),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    launch = Launch(slot.worker_id, command, config.to_yaml(), log_folder, environment)
    return Order(launch, demand.cpus, demand.gpus, demand.memory_bytes, demand.custom)


def is_wildcard(host: str) -> bool:
    """Whether a server bound to this host listens on every interface."""
    return host in ("0.0.0.0", "::")  # noqa: S104  (compared with, not bound)
