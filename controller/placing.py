"""Between Ray's nodes and the pure placement: what the slots need, what the nodes offer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster import hardware
from cluster.config import Config
from cluster.errors import ConfigError, Unavailable, Unplaceable
from cluster.model_spec import ModelSpec
from cluster.policies.node_placement import Assignment, NodeInfo, RoleDemand, Unplaced, assign, role_demand
from controller.slots import Node, NotPlaced, Placed, Slot

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Demands:
    """What each slot's process needs of a node, from the configuration and the model."""

    def __init__(self, config: Config, spec: ModelSpec) -> None:
        """Raises ConfigError for a label that is not key=value."""
        label = config.placement.attention_label
        if label is not None and not all(label.partition("=")):
            raise ConfigError(f"placement.attention_label: key=value is expected, not {label}")
        self._config = config
        self._weights_bytes = spec.parameters * _ELEMENT_BYTES[config.model.dtype]

    def of(self, slot: Slot) -> RoleDemand:
        """The demand of one slot."""
        return role_demand(self._config, slot.role, slot.worker_id, self._weights_bytes)

    def cpus(self, slots: Sequence[Slot]) -> int:
        """CPUs that hold all of these."""
        return math.ceil(sum(self.of(slot).cpus for slot in slots))


class Placer:
    """Chooses nodes from what Ray offers; implements `controller.slots.Place`."""

    def __init__(self, config: Config, demands: Demands, nodes: Callable[[], Sequence[Node]]) -> None:
        """Raises ConfigError for a hardware catalogue that cannot be used, or classes it does not know."""
        self._config = config
        self._demands = demands
        self._nodes = nodes
        self._catalogue = hardware.of(config.placement)

    def __call__(
        self, waiting: Sequence[Slot], occupied: Sequence[Slot], suspected: frozenset[str]
    ) -> dict[str, Placed | NotPlaced]:
        """An answer for each waiting slot; suspected nodes get what no other can hold."""
        try:
            nodes = [_info(node) for node in self._nodes()]
        except Unavailable as error:
            return {slot.worker_id: NotPlaced(error.message) for slot in waiting}
        demands = [self._demands.of(slot) for slot in waiting]
        there = [Assignment(slot.worker_id, slot.role, slot.node) for slot in occupied]
        answers = assign(demands, nodes, there, self._catalogue, self._config, suspected)
        return {
            answer.worker_id: Placed(answer.node_id)
            if isinstance(answer, Assignment)
            else NotPlaced(answer.missing)
            for answer in answers
        }

    def require_room(self, slots: Sequence[Slot]) -> None:
        """For a cluster of nodes that no other will join, and on which nothing runs yet: raises Unplaceable
        naming the first slot for which there would never be room, and what is missing.
        """
        nodes = [_info(replace(node, available=node.total)) for node in self._nodes()]
        demands = [self._demands.of(slot) for slot in slots]
        for answer in assign(demands, nodes, (), self._catalogue, self._config):
            if isinstance(answer, Unplaced):
                raise unplaceable(answer.worker_id, answer.missing)


def unplaceable(worker_id: str, missing: str) -> Unplaceable:
    """The error for a slot that no node can hold."""
    return Unplaceable(f"{worker_id} cannot be placed: {missing}")


def _info(node: Node) -> NodeInfo:
    return NodeInfo(node.node_id, node.hostname, node.total, node.available, node.labels)
