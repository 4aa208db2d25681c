"""What roles need and what nodes offer, between the configuration, Ray and the pure placement."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import config as configuration
from cluster.config import Config
from cluster.errors import ConfigError, Unavailable
from cluster.model_spec import ModelSpec
from cluster.policies.node_placement import RoleDemand
from controller.placing import Demands, Placer
from controller.slots import Node, NotPlaced, Placed, Slot

GIB = 2**30
GATEWAY = Slot("gateway-0", "gateway", 0)
DENSE = Slot("dense-0", "dense", 0)
ATTENTION = Slot("attention-0", "attention", 0)


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """A model of a known number of parameters."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(kind | shape | heads))
    return ModelSpec.from_folder(tmp_path)


def configured(**settings: Any) -> Config:
    """A configuration; dotted keys with two underscores."""
    return configuration.load(None, {key.replace("__", "."): value for key, value in settings.items()})


def demand(spec: ModelSpec, slot: Slot, **settings: Any) -> RoleDemand:
    """The demand of one slot."""
    return Demands(configured(**settings), spec).of(slot)


def placer(spec: ModelSpec, nodes: Callable[[], list[Node]], **settings: Any) -> Placer:
    """A placer over these nodes."""
    config = configured(**settings)
    return Placer(config, Demands(config, spec), nodes)


def node(name: str = "a", **facts: Any) -> Node:
    """A node with plenty of everything but GPUs."""
    resources = {"CPU": 8.0, "memory": 64.0 * GIB}
    return Node(
        **(
            {
                "node_id": name,
                "address": "10.0.0.1",
                "hostname": f"host-{name}",
                "total": resources,
                "available": resources,
                "labels": {},
            }
            | facts
        )
    )


def test_a_cache_and_weights_are_claimed_where_they_lie(spec: ModelSpec) -> None:
    """An arena in host memory is host memory; on a GPU it is not. Weights pass through the host."""
    small = demand(spec, ATTENTION, attention__arena="1GiB").memory_bytes
    assert demand(spec, ATTENTION, attention__arena="3GiB").memory_bytes - small == 2 * GIB
    on_gpu = demand(spec, ATTENTION, attention__arena="3GiB", attention__device="cuda")
    assert on_gpu.memory_bytes == small - GIB
    assert on_gpu.gpus == 1
    full = demand(spec, DENSE, model__dtype="float32").memory_bytes
    half = demand(spec, DENSE, model__dtype="bfloat16").memory_bytes
    assert full - half == 2 * spec.parameters
    monolithic = demand(spec, DENSE, attention__replicas=0, dense__local_arena="2GiB")
    assert monolithic.memory_bytes == full + 2 * GIB


def test_threads_are_cpus(spec: ModelSpec) -> None:
    """A private cluster claims what all slots need together."""
    both = Demands(configured(dense__threads=3, attention__threads=2), spec)
    assert [both.of(slot).cpus for slot in (DENSE, ATTENTION, GATEWAY)] == [3, 2, 1]
    assert both.cpus([DENSE, ATTENTION, ATTENTION, GATEWAY]) == 8


@pytest.mark.parametrize("label", ["disk", "=fast", "disk="])
def test_a_label_needs_key_and_value(spec: ModelSpec, label: str) -> None:
    """A label that could match nothing is refused by name."""
    with pytest.raises(ConfigError, match="attention_label"):
        Demands(configured(placement__attention_label=label), spec)


def test_a_node_with_the_attention_label_takes_no_dense_worker(spec: ModelSpec) -> None:
    """placement.attention_label sets nodes aside: attention goes there and nowhere else, dense not."""
    nodes = [node("plain"), node("labelled", labels={"disk": "fast"})]
    place = placer(spec, lambda: nodes, placement__attention_label="disk=fast")
    answers = place([ATTENTION, DENSE], [], frozenset())
    assert answers == {"attention-0": Placed("labelled"), "dense-0": Placed("plain")}
    nodes.pop(0)
    answer = place([DENSE], [], frozenset())["dense-0"]
    assert isinstance(answer, NotPlaced)


def test_attention_workers_spread_over_nodes(spec: ModelSpec) -> None:
    """What runs already counts: the second attention worker goes to the other node."""
    place = placer(spec, lambda: [node("a"), node("b")])
    there = Slot("attention-1", "attention", 1, node="a")
    assert place([ATTENTION], [there], frozenset())["attention-0"] == Placed("b")


def test_a_suspected_node_gets_only_what_no_other_can_hold(spec: ModelSpec) -> None:
    """A node that did not answer is avoided while another will do, and better than none."""
    small = {"CPU": 8.0, "memory": 1.0 * GIB}
    place = placer(spec, lambda: [node("a", available=small), node("b")])
    assert place([GATEWAY], [], frozenset({"b"}))["gateway-0"] == Placed("a")
    assert place([ATTENTION], [], frozenset({"b"}))["attention-0"] == Placed("b")
    together = place([ATTENTION, GATEWAY], [], frozenset({"b"}))
    assert together == {"attention-0": Placed("b"), "gateway-0": Placed("a")}


def test_an_unknown_hardware_class_is_refused(spec: ModelSpec) -> None:
    """A typing error in placement.dense_classes is told at the start, not by a role that waits."""
    with pytest.raises(ConfigError, match="called H1000"):
        placer(spec, list, placement__dense_classes=["H1000"])


def test_while_ray_is_silent_slots_wait(spec: ModelSpec) -> None:
    """Ray's absence is a reason given, not an error."""

    def silent() -> list[Node]:
        raise Unavailable("Ray does not answer")

    answers = placer(spec, silent)([DENSE], [], frozenset())
    assert answers == {"dense-0": NotPlaced("Ray does not answer")}
