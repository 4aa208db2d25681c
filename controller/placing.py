"""Between Ray's nodes and the pure placement: what each role needs, what each node offers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError, Unavailable
from cluster.hardware import Catalogue, load_catalogue
from cluster.model_spec import ModelSpec
from cluster.policies.node_placement import MEMORY_ROLE, ROLE_LABEL, Demand, Offer, Unplaced, assign
from controller.slots import Node, NotPlaced, Placed, Slot

_PROGRAM_BYTES = 512 * 2**20  # a worker with PyTorch, before weights and cache
_GATEWAY_BYTES = 256 * 2**20
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR_RESOURCE = "accelerator_type:"
_COUNTED = ("CPU", "GPU", "memory")


class Demands:
    """What each slot's process needs of a node, from the configuration and the model."""

    def __init__(self, config: Config, spec: ModelSpec) -> None:
        """Raises ConfigError for an unknown hardware class or a label that is not key=value."""
        self._config = config
        self._weights_bytes = spec.parameters * _ELEMENT_BYTES[config.model.dtype]
        placement = config.placement
        self.catalogue = load_catalogue(Path(placement.hardware) if placement.hardware else None)
        self.catalogue.require((*placement.dense_classes, *placement.attention_classes))
        self.label = _label(placement.attention_label)

    def of(self, slot: Slot) -> Demand:
        """The demand of one slot."""
        placement = self._config.placement
        custom = {f"anabranch_{slot.role}": 1.0} if placement.exclusive else {}
        match slot.role:
            case "dense":
                wanted = placement.dense_classes
                classes = wanted or self.catalogue.dense_rank()
            case "attention":
                wanted = placement.attention_classes
                classes = wanted or self.catalogue.attention_rank()
            case _:
                wanted = classes = ()
        return Demand(
            worker_id=slot.worker_id,
            role=slot.role,
            cpus=self._threads(slot.role),
            gpus=1.0 if self._device(slot.role) == "cuda" else 0.0,
            memory_bytes=self._memory_bytes(slot.role),
            custom=custom,
            label=self.label if slot.role == "attention" else None,
            classes=classes,
            only_classes=bool(wanted),
        )

    def cpus(self, slots: Sequence[Slot]) -> int:
        """CPUs that hold all of these."""
        return math.ceil(sum(self.of(slot).cpus for slot in slots))

    def _threads(self, role: str) -> int:
        return {"dense": self._config.dense.threads, "attention": self._config.attention.threads}.get(role, 1)

    def _device(self, role: str) -> str:
        return {"dense": self._config.dense.device, "attention": self._config.attention.device}.get(
            role, "cpu"
        )

    def _memory_bytes(self, role: str) -> int:
        """Host memory: on a GPU node the arena lies elsewhere, but weights pass through."""
        on_host = self._device(role) == "cpu"
        match role:
            case "dense":
                return _PROGRAM_BYTES + self._weights_bytes + on_host * self._config.dense.local_arena
            case "attention":
                return _PROGRAM_BYTES + on_host * self._config.attention.arena
            case _:
                return _GATEWAY_BYTES


class Placer:
    """Chooses nodes from what Ray offers; implements `controller.slots.Place`."""

    def __init__(self, demands: Demands, nodes: Callable[[], Sequence[Node]]) -> None:
        self._demands = demands
        self._nodes = nodes

    def __call__(
        self, waiting: Sequence[Slot], occupied: Sequence[Slot], suspected: frozenset[str]
    ) -> Mapping[str, Placed | NotPlaced]:
        """An answer for each waiting slot."""
        try:
            nodes = self._nodes()
        except Unavailable as error:
            return {slot.worker_id: NotPlaced(error.message) for slot in waiting}
        offers = [offer(node, self._demands.catalogue, self._demands.label) for node in nodes]
        counts = Counter((slot.node, slot.role) for slot in occupied)
        answers = assign([self._demands.of(slot) for slot in waiting], offers, counts, suspected)
        return {
            worker: NotPlaced(answer.missing) if isinstance(answer, Unplaced) else Placed(answer)
            for worker, answer in answers.items()
        }


def offer(node: Node, catalogue: Catalogue, attention_label: tuple[str, str] | None) -> Offer:
    """What a node has left. One that carries the label of attention workers is set aside for them."""
    labels = dict(node.labels)
    if attention_label is not None and labels.get(attention_label[0]) == attention_label[1]:
        labels[ROLE_LABEL] = MEMORY_ROLE
    cpus, gpus, memory_bytes = (node.available.get(name, 0.0) for name in _COUNTED)
    return Offer(
        node_id=node.node_id,
        hostname=node.hostname,
        hardware=catalogue.class_of(_accelerator(node)),
        cpus=cpus,
        gpus=gpus,
        memory_bytes=memory_bytes,
        custom={name: amount for name, amount in node.available.items() if name not in _COUNTED},
        labels=labels,
    )


def _accelerator(node: Node) -> str | None:
    """Ray's name of the node's accelerator, from its label or its marker resource."""
    marked = (name for name in node.total if name.startswith(_ACCELERATOR_RESOURCE))
    marker = next(marked, None)
    return node.labels.get(_ACCELERATOR_LABEL) or (marker and marker.removeprefix(_ACCELERATOR_RESOURCE))


def _label(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ConfigError(f"placement.attention_label: key=value is expected, not {text}")
    return key, value
