"""Node placement: each role on its kind of node, spread, within what is free; and precise complaints."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import AttentionConfig, Config, DenseConfig, TierConfig
from cluster.hardware import built_in
from cluster.placement_settings import PlacementConfig
from cluster.policies.node_placement import (
    PROCESS_BYTES,
    Assignment,
    NodeInfo,
    Role,
    RoleDemand,
    Unplaced,
    assign,
    role_demand,
)

GIB = 2**30
CONFIG = Config()


def node(
    name: str,
    *,
    cpus: float = 8,
    gpus: float = 0,
    accelerator: str | None = None,
    memory_gib: float = 64,
    labels: dict[str, str] | None = None,
    alive: bool = True,
    **custom: float,
) -> NodeInfo:
    """A machine with everything free."""
    total = {"CPU": cpus, "memory": memory_gib * GIB, **custom}
    if gpus:
        total["GPU"] = gpus
    if accelerator:
        total[f"accelerator_type:{accelerator}"] = 1.0
    return NodeInfo(name, f"host-{name}", total, dict(total), labels or {}, alive)


def dense(name: str = "dense-0", **changes: Any) -> RoleDemand:
    """A dense worker on one GPU."""
    return RoleDemand(name, "dense", **{"gpus": 1, **changes})


def attention(name: str = "attention-0", **changes: Any) -> RoleDemand:
    """An attention worker with 8 GiB."""
    return RoleDemand(name, "attention", **{"memory_bytes": 8 * GIB, **changes})


def where(
    demands: list[RoleDemand],
    nodes: list[NodeInfo],
    *occupied: tuple[str, Role, str],
    config: Config = CONFIG,
) -> list[str]:
    """Node of each demand, or what is missing."""
    placed = assign(demands, nodes, [Assignment(*item) for item in occupied], built_in(), config)
    return [item.missing if isinstance(item, Unplaced) else item.node_id for item in placed]


def test_dense_goes_where_flops_are_cheapest_and_attention_where_bandwidth_is() -> None:
    """Both on GPUs: the H100 computes, the H20 attends, whatever the order of the nodes."""
    nodes = [node("a", gpus=1, accelerator="H20"), node("b", gpus=1, accelerator="H100")]
    for order in (nodes, nodes[::-1]):
        assert where([dense()], order) == ["b"]
        assert where([attention(gpus=1)], order) == ["a"]


def test_configured_classes_decide_instead() -> None:
    """They order and restrict, by the catalogue's names or Ray's, in any case."""
    nodes = [node("a", gpus=1, accelerator="H20"), node("b", gpus=1, accelerator="H100")]
    assert where([dense(classes=("H20", "h100"))], nodes) == ["a"]
    assert where([dense(classes=("h20",)), dense("dense-1", classes=("h20",))], nodes) == [
        "a",
        "needs GPU: 1; largest free on one node is 0",
    ]


def test_dense_never_goes_to_a_memory_node() -> None:
    """Neither to one labelled so nor to one that carries the attention label, even if it has the GPU."""
    config = Config(placement=PlacementConfig(attention_label="pool=kv"))
    nodes = [
        node("a", gpus=4, accelerator="H100", labels={"anabranch-role": "memory"}),
        node("b", gpus=4, accelerator="H100", labels={"pool": "kv"}),
        node("c", gpus=1, accelerator="L4"),
    ]
    assert where([dense()], nodes, config=config) == ["c"]
    assert where([dense()], nodes[:2], config=config) == [
        "needs a node for dense workers: all 2 are memory nodes (label anabranch-role=memory or pool=kv)"
    ]


def test_attention_spreads_and_prefers_memory_nodes() -> None:
    """Memory nodes first, then whoever has fewest attention workers; those that run already count."""
    nodes = [node("a"), node("b"), node("c")]
    demands = [attention(f"attention-{index}") for index in range(1, 4)]
    placed = where(demands, nodes, ("attention-0", "attention", "b"))
    assert placed[:2] == ["a", "c"]
    assert Counter(["b", *placed]) in (Counter("aabc"), Counter("abbc"), Counter("abcc"))
    nodes.append(node("d", labels={"anabranch-role": "memory"}))
    assert where(demands[:2], nodes) == ["d", "d"]


def test_attention_needs_the_configured_label() -> None:
    """placement.attention_label is demanded of the node, and named when nobody has it."""
    config = Config(placement=PlacementConfig(attention_label="pool=kv"))
    demand = role_demand(config, "attention", "attention-0")
    nodes = [node("a"), node("b", labels={"pool": "other"})]
    assert where([demand], nodes, config=config) == ["needs label pool=kv: nodes have other"]
    assert where([demand], nodes[:1], config=config) == ["needs label pool=kv: nodes have no label pool"]
    assert where([demand], [*nodes, node("c", labels={"pool": "kv"})], config=config) == ["c"]


def test_work_without_gpu_leaves_gpu_nodes_alone() -> None:
    """CPU roles take nodes without accelerators while there are any."""
    nodes = [node("a", gpus=8, accelerator="H100", cpus=64), node("b", cpus=4)]
    gateway = RoleDemand("gateway-0", "gateway")
    assert where([dense(gpus=0), attention(), gateway], nodes) == ["b", "b", "b"]
    assert where([gateway], nodes[:1]) == ["a"]


def test_a_node_to_avoid_is_the_last_resort() -> None:
    """It is passed over while another will do, by each demand on its own, and taken when none will."""
    nodes = [node("a"), node("b", cpus=1)]
    demands = [attention(f"attention-{index}") for index in range(2)]
    placed = assign(demands, nodes, (), built_in(), CONFIG, avoid=frozenset({"a"}))
    assert [item.node_id for item in placed if isinstance(item, Assignment)] == ["b", "a"]


def test_claims_within_one_call_add_up() -> None:
    """What an earlier demand takes is gone for the next."""
    demands = [attention(f"attention-{index}") for index in range(3)]
    assert where(demands, [node("a", memory_gib=18)]) == [
        "a",
        "a",
        "needs 8.0 GiB memory: largest free is 2.0 GiB",
    ]


@pytest.mark.parametrize(
    ("demand", "nodes", "missing"),
    [
        (dense(), [node("a")], "needs GPU: 1; nodes offer: none"),
        (
            dense(classes=("h100",)),
            [node("a", gpus=4, accelerator="A100"), node("b", gpus=1, accelerator="L4")],
            "needs GPU: 1 of type h100; nodes offer: 4 of A100, 1 of L4",
        ),
        (dense(cpus=9), [node("a", gpus=1)], "needs CPU: 9; largest free on one node is 8"),
        (
            dense(custom=(("anabranch_dense", 1.0),)),
            [node("a", gpus=1)],
            "needs anabranch_dense: 1; largest free on one node is 0",
        ),
        (dense(gpus=0, classes=("h100",)), [node("a")], "needs a node of type h100; nodes offer GPUs: none"),
        (attention(), [node("a", alive=False)], "needs a node: none is alive"),
        (attention(), [], "needs a node: none is alive"),
    ],
)
def test_what_is_missing_is_named(demand: RoleDemand, nodes: list[NodeInfo], missing: str) -> None:
    """Resource, amount, and what the nodes offer."""
    assert where([demand], nodes) == [missing]


def test_demands_follow_from_the_configuration() -> None:
    """Arena plus margin on the host, or a GPU; exclusive roles demand their custom resource."""
    claims = role_demand(CONFIG, "attention", "attention-0")
    assert claims.resources == {"CPU": 1, "memory": CONFIG.attention.arena + PROCESS_BYTES}
    weights = role_demand(CONFIG, "dense", "dense-0", weights_bytes=5 * GIB)
    assert weights.memory_bytes == PROCESS_BYTES + 5 * GIB
    config = Config(
        dense=DenseConfig(device="cuda", threads=3),
        placement=PlacementConfig(exclusive=True, dense_classes=("h100",)),
    )
    claims = role_demand(config, "dense", "dense-0", weights_bytes=5 * GIB)
    assert claims.resources == {"CPU": 3, "GPU": 1, "memory": PROCESS_BYTES, "anabranch_dense": 1}
    assert claims.classes == ("h100",)
    assert role_demand(config, "gateway", "gateway-0").custom == (("anabranch_gateway", 1.0),)


def test_a_worker_of_several_arenas_demands_them_all() -> None:
    """One GPU where any arena lies on it, and host memory for those that do not."""
    tiers = (TierConfig(arena=30 * GIB), TierConfig(arena=4 * GIB))
    config = Config(attention=AttentionConfig(device="cuda", arena=10 * GIB, tiers=tiers))
    claims = role_demand(config, "attention", "attention-0")
    assert claims.resources == {"CPU": 1, "GPU": 1, "memory": PROCESS_BYTES + 34 * GIB}


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 20)), max_size=4),
    st.lists(st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 1), st.integers(0, 9)), max_size=8),
)
def test_nothing_is_claimed_twice(
    sizes: list[tuple[int, int, int]], wants: list[tuple[bool, int, int, int]]
) -> None:
    """Whatever is asked: claims stay within what is free, and who is refused fits nowhere at its turn."""
    nodes = [node(f"n{i}", cpus=c, gpus=g, memory_gib=m) for i, (c, g, m) in enumerate(sizes)]
    demands = [
        RoleDemand(f"w{i}", "dense" if is_dense else "attention", cpus=c, gpus=g, memory_bytes=m * GIB)
        for i, (is_dense, c, g, m) in enumerate(wants)
    ]
    free = {item.node_id: dict(item.available) for item in nodes}
    answers = assign(demands, nodes, (), built_in(), CONFIG)
    for demand, answer in zip(demands, answers, strict=True):
        if isinstance(answer, Assignment):
            for name, amount in demand.resources.items():
                free[answer.node_id][name] -= amount
                assert free[answer.node_id][name] >= 0
        else:
            short = [[n for n, a in demand.resources.items() if has.get(n, 0) < a] for has in free.values()]
            assert all(short)
