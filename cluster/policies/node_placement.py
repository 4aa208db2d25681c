"""Which node each role's process runs on. Pure: nodes and demands in, assignments out.

Dense workers go where FLOPS are cheapest, attention workers where memory (bandwidth) is, and are spread;
a node set aside for memory never gets a dense worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ROLE_LABEL = "anabranch-role"
"""A node labelled `anabranch-role=memory` holds attention workers and no dense ones."""

MEMORY_ROLE = "memory"


@dataclass(frozen=True, slots=True)
class Offer:
    """A live node: what it has left, its labels and its hardware class. memory in bytes."""

    node_id: str
    hostname: str
    hardware: str
    cpus: float
    gpus: float
    memory_bytes: float
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_memory_node(self) -> bool:
        """Whether it is set aside for the KV cache."""
        return self.labels.get(ROLE_LABEL) == MEMORY_ROLE


@dataclass(frozen=True, slots=True)
class Demand:
    """What one process needs of a node. `label`: key and value it must carry. `classes`: hardware
    classes, best first; with `only_classes` no other will do.
    """

    worker_id: str
    role: str
    cpus: float = 0.0
    gpus: float = 0.0
    memory_bytes: int = 0
    custom: Mapping[str, float] = field(default_factory=dict)
    label: tuple[str, str] | None = None
    classes: tuple[str, ...] = ()
    only_classes: bool = False


@dataclass(frozen=True, slots=True)
class Unplaced:
    """No node will do; `missing` says what no node offers, and what the best one does."""

    missing: str


def assign(
    demands: Sequence[Demand],
    offers: Iterable[Offer],
    role_counts: Mapping[tuple[str, str], int],
    avoid: frozenset[str] = frozenset(),
) -> dict[str, str | Unplaced]:
    """A node id or the reason against, per worker id. Earlier demands are served first.

    `role_counts`: (node id, role) -> processes of that role there already. Nodes in `avoid` are taken
    only where nothing else will do.
    """
    left = {offer.node_id: offer for offer in offers}
    counts = Counter(dict(role_counts))
    answers: dict[str, str | Unplaced] = {}
    for demand in demands:
        fitting, missing = _fitting(demand, list(left.values()))
        if not fitting:
            answers[demand.worker_id] = Unplaced(missing)
            continue
        best = min(fitting, key=lambda offer: _order(demand, offer, counts, avoid))
        answers[demand.worker_id] = best.node_id
        counts[best.node_id, demand.role] += 1
        left[best.node_id] = _less(best, demand)
    return answers


def _order(
    demand: Demand, offer: Offer, counts: Mapping[tuple[str, str], int], avoid: frozenset[str]
) -> tuple[object, ...]:
    """Smaller is better. Attention is spread before its class is considered, dense the other way round."""
    rank = demand.classes.index(offer.hardware) if offer.hardware in demand.classes else len(demand.classes)
    crowd = counts.get((offer.node_id, demand.role), 0)
    wasted_gpu = offer.gpus > 0 and demand.gpus == 0
    if demand.role == "attention":
        preference: tuple[object, ...] = (
            not offer.is_memory_node,
            wasted_gpu,
            crowd,
            rank,
            -offer.memory_bytes,
        )
    elif demand.role == "dense":
        preference = (rank, wasted_gpu, crowd, -offer.cpus)
    else:
        preference = (wasted_gpu, offer.is_memory_node, crowd, -offer.cpus)
    return (offer.node_id in avoid, *preference, offer.node_id)


def _fitting(demand: Demand, offers: list[Offer]) -> tuple[list[Offer], str]:
    """The nodes that meet every need; when there are none, the need that left none."""
    if not offers:
        return [], "no node is alive"
    for needs, meets, offered in _needs(demand):
        kept = [offer for offer in offers if meets(offer)]
        if not kept:
            return [], f"needs {needs}; {_said(offers, offered)}"
        offers = kept
    return offers, ""


_Need = tuple[str, Callable[[Offer], bool], Callable[[Offer], str]]


def _needs(demand: Demand) -> list[_Need]:
    """What is asked for, in the order in which a missing one is worth naming."""
    needs: list[_Need] = []
    if demand.role == "dense":
        needs.append(_NOT_MEMORY)
    if demand.label is not None:
        needs.append(_labelled(*demand.label))
    if demand.only_classes:
        classes = demand.classes
        names = " or ".join(classes)
        needs.append(
            (f"hardware {names}", lambda offer: offer.hardware in classes, lambda offer: offer.hardware)
        )
    needs += [_amount(f"{demand.gpus:g} GPU", lambda o: o.gpus, demand.gpus, lambda v: f"{v:g} GPU")]
    needs += [
        _amount(_gib(demand.memory_bytes), lambda o: o.memory_bytes, demand.memory_bytes, _gib),
        _amount(f"{demand.cpus:g} CPU", lambda o: o.cpus, demand.cpus, lambda v: f"{v:g} CPU"),
    ]
    for name, amount in demand.custom.items():
        needs.append(_custom(name, amount))
    return needs


_NOT_MEMORY: _Need = (
    f"a node without label {ROLE_LABEL}={MEMORY_ROLE}",
    lambda offer: not offer.is_memory_node,
    lambda _offer: f"{ROLE_LABEL}={MEMORY_ROLE}",
)


def _labelled(key: str, value: str) -> _Need:
    return (
        f"a node labelled {key}={value}",
        lambda offer: offer.labels.get(key) == value,
        lambda offer: f"{key}={offer.labels.get(key, 'unset')}",
    )


def _amount(needs: str, have: Callable[[Offer], float], wanted: float, show: Callable[[float], str]) -> _Need:
    return needs, lambda offer: have(offer) >= wanted, lambda offer: f"{show(have(offer))} free"


def _custom(name: str, amount: float) -> _Need:
    return _amount(
        f"{amount:g} of resource {name}", lambda o: o.custom.get(name, 0.0), amount, lambda v: f"{v:g} {name}"
    )


def _gib(memory_bytes: float) -> str:
    return f"{memory_bytes / 2**30:.2f} GiB memory"


def _said(offers: Sequence[Offer], offered: Callable[[Offer], str]) -> str:
    shown = ", ".join(f"{offer.hostname}: {offered(offer)}" for offer in offers[:4])
    more = f" and {len(offers) - 4} more" if len(offers) > 4 else ""
    return f"nodes in question have {shown}{more}"


def _less(offer: Offer, demand: Demand) -> Offer:
    custom = {name: have - demand.custom.get(name, 0.0) for name, have in offer.custom.items()}
    return Offer(
        offer.node_id,
        offer.hostname,
        offer.hardware,
        offer.cpus - demand.cpus,
        offer.gpus - demand.gpus,
        offer.memory_bytes - demand.memory_bytes,
        custom,
        offer.labels,
    )
