"""Which node a role's process runs on: pure, so every rule has its case."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.policies.node_placement import MEMORY_ROLE, ROLE_LABEL, Demand, Offer, Unplaced, assign

GIB = 2**30


def _offer(name: str, hardware: str = "cpu-node", **fields: object) -> Offer:
    defaults: dict[str, object] = {"cpus": 8.0, "gpus": 0.0, "memory_bytes": 16.0 * GIB}
    return Offer(name, name, hardware, **(defaults | fields))  # type: ignore[arg-type]  # fields of the case


def _attention(index: int = 0, memory_bytes: int = GIB) -> Demand:
    return Demand(f"attention-{index}", "attention", cpus=1, memory_bytes=memory_bytes)


def _dense(index: int = 0, classes: tuple[str, ...] = ("L4", "H100"), only: bool = False) -> Demand:
    return Demand(f"dense-{index}", "dense", cpus=1, gpus=1, classes=classes, only_classes=only)


def _demand(role: str, index: int) -> Demand:
    if role == "gateway":
        return Demand(f"gateway-{index}", role, cpus=1)
    return _dense(index) if role == "dense" else _attention(index)


def test_dense_takes_the_best_class_and_then_the_next() -> None:
    """The class ranks first; when its GPUs are taken the next class serves."""
    offers = [_offer("a", "H100", gpus=1.0), _offer("b", "L4", gpus=1.0)]
    assert assign([_dense(0), _dense(1)], offers, {}) == {"dense-0": "b", "dense-1": "a"}


def test_dense_never_goes_to_a_memory_node() -> None:
    """A node set aside for memory is no place for weights, whatever it has free."""
    answer = assign([_dense()], [_offer("m", "H100", gpus=8.0, labels={ROLE_LABEL: MEMORY_ROLE})], {})[
        "dense-0"
    ]
    assert isinstance(answer, Unplaced)
    assert ROLE_LABEL in answer.missing


def test_attention_is_spread_over_memory_nodes_first() -> None:
    """Nodes set aside for memory come first, the emptiest of them each time."""
    labels = {ROLE_LABEL: MEMORY_ROLE}
    offers = [_offer("m", labels=labels), _offer("n", labels=labels), _offer("o", memory_bytes=512.0 * GIB)]
    answers = assign([_attention(0), _attention(1), _attention(2)], offers, {("m", "attention"): 1})
    assert answers["attention-0"] == "n"
    assert set(answers.values()) == {"m", "n"}


def test_a_gpu_is_not_wasted_on_who_needs_none() -> None:
    """Gateways and host-memory caches leave GPU nodes to others while they can."""
    offers = [_offer("g", "H100", gpus=4.0, cpus=64.0), _offer("c")]
    gateway = Demand("gateway-0", "gateway", cpus=1)
    assert assign([gateway, _attention()], offers, {}) == {"gateway-0": "c", "attention-0": "c"}


def test_a_suspected_node_is_the_last_resort() -> None:
    """It is avoided while another will do, and taken when none will."""
    offers = [_offer("a"), _offer("b", cpus=1.0)]
    answers = assign([_attention(0), _attention(1)], offers, {}, avoid=frozenset({"a"}))
    assert answers == {"attention-0": "b", "attention-1": "a"}


def test_the_missing_resource_is_named_with_what_there_is() -> None:
    """Each kind of need is named by itself, beside what the nodes in question have."""
    offers = [_offer("a", memory_bytes=2.0 * GIB)]
    cases = {
        "1 GPU": _dense(),
        "hardware H100": Demand("x", "dense", classes=("H100",), only_classes=True),
        "8.00 GiB memory": _attention(memory_bytes=8 * GIB),
        "99 CPU": Demand("x", "gateway", cpus=99),
        "labelled disk=fast": Demand("x", "attention", label=("disk", "fast")),
        "resource anabranch_gateway": Demand("x", "gateway", custom={"anabranch_gateway": 1.0}),
    }
    for named, demand in cases.items():
        answer = assign([demand], offers, {})[demand.worker_id]
        assert isinstance(answer, Unplaced)
        assert named in answer.missing
        assert "a: " in answer.missing


def test_no_node_at_all_is_said() -> None:
    """An empty cluster is not blamed on a resource."""
    assert assign([_attention()], [], {})["attention-0"] == Unplaced("no node is alive")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=5),
    st.lists(st.sampled_from(["dense", "attention", "gateway"]), min_size=1, max_size=8),
)
def test_nothing_is_ever_overcommitted(nodes: list[tuple[int, int, int]], roles: list[str]) -> None:
    """Whatever is asked, no node gives more CPUs, GPUs or memory than it has."""
    offers = [
        _offer(f"n{i}", cpus=float(cpus), gpus=float(gpus), memory_bytes=float(memory * GIB))
        for i, (cpus, gpus, memory) in enumerate(nodes)
    ]
    demands = [_demand(role, index) for index, role in enumerate(roles)]
    answers = assign(demands, offers, {})
    for offer in offers:
        placed = [demand for demand in demands if answers[demand.worker_id] == offer.node_id]
        assert sum(demand.cpus for demand in placed) <= offer.cpus
        assert sum(demand.gpus for demand in placed) <= offer.gpus
        assert sum(demand.memory_bytes for demand in placed) <= offer.memory_bytes
