"""Which node each role process goes to. Pure: nodes as Ray reports them in, assignments out.

Dense workers go where FLOPS are cheapest, attention workers where memory bandwidth is (the two columns of
Lamina's argument, arXiv 2405.01814), gateways wherever a CPU is free. Who cannot be placed learns exactly
which resource is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.config import Config
from cluster.hardware import Catalogue, attention_rank, class_of, dense_rank

Role = Literal["gateway", "dense", "attention"]

ROLE_LABEL = "anabranch-role"
"""Node label; `anabranch-role=memory` keeps dense workers off a node."""

PROCESS_BYTES = 512 * 2**20
"""Margin beside an arena: interpreter, libraries and buffers of one worker process."""

_ACCELERATOR = "accelerator_type:"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A machine as Ray describes it; resources in Ray's units (memory in bytes). `available` is what no
    living process has claimed.
    """

    node_id: str
    hostname: str
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str]
    alive: bool = True

    @property
    def accelerator_types(self) -> tuple[str, ...]:
        """Ray's names of what is in it, from its resources or its label."""
        named = [key.removeprefix(_ACCELERATOR) for key in self.total if key.startswith(_ACCELERATOR)]
        label = self.labels.get("ray.io/accelerator-type")
        return tuple(dict.fromkeys([*named, *([label] if label else [])]))

    @property
    def is_memory_node(self) -> bool:
        """Marked as a place for KV cache only."""
        return self.labels.get(ROLE_LABEL) == "memory"


@dataclass(frozen=True, slots=True)
class RoleDemand:
    """What one process needs. `classes`: the only hardware it may run on, best first, by the names of the
    catalogue or of Ray, in any case; empty is any.
    """

    worker_id: str
    role: Role
    cpus: float = 1
    gpus: float = 0
    memory_bytes: int = 0
    custom: tuple[tuple[str, float], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def resources(self) -> dict[str, float]:
        """In Ray's names and units, zeros left out."""
        claims = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes), **dict(self.custom)}
        return {name: amount for name, amount in claims.items() if amount > 0}


@dataclass(frozen=True, slots=True)
class Assignment:
    """A process and its node."""

    worker_id: str
    role: Role
    node_id: str


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A process without a node; `missing` names the resource, what is needed and what there is."""

    worker_id: str
    missing: str


def role_demand(config: Config, role: Role, worker_id: str, weights_bytes: int = 0) -> RoleDemand:
    """What the configuration asks of a node for one process of a role.

    Host memory is PROCESS_BYTES and, unless they lie on a GPU, arenas and (dense) the weights.
    """
    place = config.placement
    demand = RoleDemand(
        worker_id,
        role,
        memory_bytes=PROCESS_BYTES,
        custom=((f"anabranch_{role}", 1.0),) if place.exclusive else (),
    )
    if role == "gateway":
        return demand
    if role == "dense":
        held = [(config.dense.device, config.dense.local_arena + weights_bytes)]
        demand = replace(demand, cpus=config.dense.threads, classes=place.dense_classes)
    else:
        held = [(tier.device, tier.arena) for tier in config.attention.every_tier]
        demand = replace(demand, cpus=config.attention.threads, classes=place.attention_classes)
        demand = replace(demand, labels=_label(place.attention_label))
    host_bytes = sum(size_bytes for device, size_bytes in held if device == "cpu")
    is_on_gpu = any(device == "cuda" for device, _ in held)
    return replace(demand, gpus=int(is_on_gpu), memory_bytes=PROCESS_BYTES + host_bytes)


def _label(text: str | None) -> tuple[tuple[str, str], ...]:
    if text is None:
        return ()
    key, _, value = text.partition("=")
    return ((key, value),)


def assign(
    demands: Sequence[RoleDemand],
    nodes: Sequence[NodeInfo],
    occupied: Sequence[Assignment],
    catalogue: Catalogue,
    config: Config,
    avoid: frozenset[str] = frozenset(),
) -> tuple[Assignment | Unplaced, ...]:
    """An answer for each demand, in their order; earlier ones claim first. Nodes in `avoid` (they did not
    answer lately) get only what no other can take.

    `occupied` are the processes that run already: their claims are out of `available`, and attention workers
    avoid each other's nodes. Dense workers never go to a memory node, nor to one that carries
    placement.attention_label.
    """
    alive = [node for node in nodes if node.alive]
    board = _Board(alive, catalogue, _label(config.placement.attention_label), avoid)
    board.attention.update(item.node_id for item in occupied if item.role == "attention")
    return tuple(board.place(demand) for demand in demands)


_Test = Callable[[NodeInfo], bool]
_Say = Callable[[Sequence[NodeInfo]], str]


@dataclass(slots=True)
class _Board:
    """Nodes with what is still free on each while demands are placed one after another."""

    nodes: Sequence[NodeInfo]
    catalogue: Catalogue
    memory_labels: tuple[tuple[str, str], ...]
    avoid: frozenset[str]
    attention: Counter[str] = field(default_factory=Counter)
    free: dict[str, dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.free = {node.node_id: dict(node.available) for node in self.nodes}

    def place(self, demand: RoleDemand) -> Assignment | Unplaced:
        """The best node that has all, claimed; or the first requirement that no node is left for."""
        if not self.nodes:
            return Unplaced(demand.worker_id, "needs a node: none is alive")
        candidates = list(self.nodes)
        for test, missing in self._requirements(demand):
            left = [node for node in candidates if test(node)]
            if not left:
                return Unplaced(demand.worker_id, missing(candidates))
            candidates = left
        chosen = min(
            candidates, key=lambda node: (node.node_id in self.avoid, *self._preference(demand, node))
        )
        for name, amount in demand.resources.items():
            self.free[chosen.node_id][name] -= amount
        if demand.role == "attention":
            self.attention[chosen.node_id] += 1
        return Assignment(demand.worker_id, demand.role, chosen.node_id)

    def _requirements(self, demand: RoleDemand) -> list[tuple[_Test, _Say]]:
        """(test, what to say of the nodes left when none passes), kind of node first, then amounts."""
        rules: list[tuple[_Test, _Say]] = []
        if demand.role == "dense":
            rules.append((self._may_compute, self._all_for_memory))
        for key, value in demand.labels:
            rules.append((_has_label(key, value), _needs_label(key, value)))
        if demand.gpus or demand.classes:
            rules.append(
                (lambda node: self._is_suitable(demand, node), lambda left: _needs_kind(demand, left))
            )
        for name, amount in sorted(demand.resources.items(), key=lambda item: item[0] in ("CPU", "memory")):
            rules.append((self._has_free(name, amount), self._needs_amount(name, amount)))
        return rules

    def _may_compute(self, node: NodeInfo) -> bool:
        marked = any(node.labels.get(key) == value for key, value in self.memory_labels)
        return not (node.is_memory_node or marked)

    def _all_for_memory(self, left: Sequence[NodeInfo]) -> str:
        marks = [f"{ROLE_LABEL}=memory", *(f"{key}={value}" for key, value in self.memory_labels)]
        return (
            f"needs a node for dense workers: all {len(left)} are memory nodes (label {' or '.join(marks)})"
        )

    def _is_suitable(self, demand: RoleDemand, node: NodeInfo) -> bool:
        if demand.gpus and node.total.get("GPU", 0) < demand.gpus:
            return False
        return not demand.classes or self._class_rank(demand.classes, node) < len(demand.classes)

    def _class_rank(self, best_first: Sequence[str], node: NodeInfo) -> int:
        """Where the node's hardware stands in a list of names; the list's length if it does not."""
        names = {name.upper() for name in node.accelerator_types}
        found = class_of(node.accelerator_types, self.catalogue)
        names |= {found.name.upper()} if found else set()
        return next((i for i, name in enumerate(best_first) if name.upper() in names), len(best_first))

    def _has_free(self, name: str, amount: float) -> _Test:
        return lambda node: self.free[node.node_id].get(name, 0.0) >= amount - 1e-9

    def _needs_amount(self, name: str, amount: float) -> _Say:
        def say(left: Sequence[NodeInfo]) -> str:
            largest = max(self.free[node.node_id].get(name, 0.0) for node in left)
            if name == "memory":
                return f"needs {amount / _GIB:.1f} GiB memory: largest free is {largest / _GIB:.1f} GiB"
            return f"needs {name}: {amount:g}; largest free on one node is {largest:g}"

        return say

    def _preference(self, demand: RoleDemand, node: NodeInfo) -> tuple[object, ...]:
        """Least is best; ends in names, so that equal nodes are taken in a fixed order."""
        free = self.free[node.node_id]
        has_accelerator = bool(node.accelerator_types or node.total.get("GPU", 0))
        spare = has_accelerator and not demand.gpus
        names = (node.hostname, node.node_id)
        if demand.role == "attention":
            crowd = self.attention[node.node_id]
            kind = self._class_rank(demand.classes or attention_rank(self.catalogue), node)
            return not node.is_memory_node, crowd, spare, kind, -free.get("memory", 0.0), *names
        if demand.role == "dense":
            kind = self._class_rank(demand.classes or dense_rank(self.catalogue), node)
            return spare, kind, -free.get("CPU", 0.0), *names
        return spare, not self._may_compute(node), -free.get("CPU", 0.0), *names


def _has_label(key: str, value: str) -> _Test:
    return lambda node: node.labels.get(key) == value


def _needs_label(key: str, value: str) -> _Say:
    def say(left: Sequence[NodeInfo]) -> str:
        offered = sorted({node.labels[key] for node in left if key in node.labels})
        return f"needs label {key}={value}: nodes have {', '.join(offered) if offered else f'no label {key}'}"

    return say


def _needs_kind(demand: RoleDemand, left: Sequence[NodeInfo]) -> str:
    """`needs GPU: 1 of type h100; nodes offer: 4 of A100, 1 of L4`."""
    offered: Counter[str] = Counter()
    for node in left:
        count = int(node.total.get("GPU", 0))
        offered[", ".join(node.accelerator_types) or ("an unknown type" if count else "")] += count
    listed = ", ".join(f"{count} of {name}" for name, count in sorted(offered.items()) if count)
    kind = f" of type {' or '.join(demand.classes)}" if demand.classes else ""
    if demand.gpus:
        return f"needs GPU: {demand.gpus:g}{kind}; nodes offer: {listed or 'none'}"
    return f"needs a node{kind}; nodes offer GPUs: {listed or 'none'}"
