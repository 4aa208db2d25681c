"""How many workers a load needs: numbers a hand can compute, and the command that prints them."""

from __future__ import annotations

import json

import pytest
import typer.testing
import yaml
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cli.size import size_command
from cluster.errors import InvalidRequest
from cluster.perfmodel import DeviceSpeed, ModelShape
from cluster.sizing import Machines, Need, size
from deploy.helm.values import Values

MODEL = ModelShape(weight_bytes=2e9, element_bytes=2, layers=10, hidden_size=1000, query_group=2)
"""10**9 parameters; a token of cache is 20,000 bytes."""
DEVICE = DeviceSpeed(flops_per_s=1e12, bandwidth_bytes_per_s=1e11, memory_bytes=1e10)
MACHINES = Machines(DEVICE, DEVICE, arena_bytes=10**9, fill=0.75)


def test_memory_alone_decides_without_an_objective() -> None:
    """100 sequences of 1,000 tokens are 2 GB: three arenas of 1 GB three quarters full, not two."""
    found = size(MODEL, Need(1000, 100), MACHINES)
    assert found.cache_bytes == 2e9
    assert (found.attention_workers, found.dense_workers) == (3, 1)
    assert found.held == 150


def test_the_step_is_the_models_floor() -> None:
    """Dense: 2 x 10**9 x 100 FLOP at 10**12 a second; attention: 2 GB over three times 100 GB/s."""
    found = size(MODEL, Need(1000, 100), MACHINES)
    assert found.step_s == pytest.approx(0.2 + 2e9 / 3e11)
    assert found.bottleneck == "dense"


def test_an_objective_adds_workers_on_both_sides() -> None:
    """60 ms a token: dense work in at most half of it, attention in what is left."""
    found = size(MODEL, Need(1000, 100, token_s=0.06), MACHINES)
    assert found.dense_workers == 8  # seven would have 15 sequences each, which take 30 ms
    assert found.step_s <= 0.06


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    """Weights larger than a device; a time in which not even the weights can be read."""
    small = DeviceSpeed(1e12, 1e11, memory_bytes=1e9)
    with pytest.raises(InvalidRequest, match=r"2\.0 GB do not fit"):
        size(MODEL, Need(1000, 1), Machines(small, DEVICE, 10**9, 0.75))
    with pytest.raises(InvalidRequest, match=r"20\.0 ms on this device"):
        size(MODEL, Need(1000, 1, token_s=0.01), MACHINES)


@given(st.integers(1, 10**5), st.integers(1, 1000), st.none() | st.floats(0.021, 1))
def test_the_pool_always_holds_what_was_asked_for(
    context: int, concurrency: int, token_s: float | None
) -> None:
    """Whatever is asked for fits with room to spare, and keeps the objective."""
    found = size(MODEL, Need(context, concurrency, token_s), MACHINES)
    assert found.cache_bytes <= 0.75 * MACHINES.arena_bytes * found.attention_workers
    assert token_s is None or found.step_s <= token_s * (1 + 1e-9)


def _printed(*words: str) -> str:
    app = typer.Typer()
    app.command()(size_command)
    outcome = typer.testing.CliRunner().invoke(app, list(words))
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_the_command_prints_values_of_the_chart() -> None:
    """What follows the explanation is a file of values, of keys that the chart knows."""
    words = ("--model", "llama3-8b", "--context", "32768", "--concurrency", "64", "--arena", "64GiB")
    printed = _printed(*words, "--dense", "l40s")
    values = Values.model_validate(yaml.safe_load(printed.partition("# values for")[2].partition("\n")[2]))
    assert (values.dense.replicas, values.dense.device) == (1, "cuda")
    assert (values.attention.replicas, values.attention.arena) == (6, "65536MiB")
    found = json.loads(_printed(*words, "--dense", "l40s", "--json"))
    assert found["attention_workers"] == 6


def test_a_dtype_of_twice_the_bytes_doubles_memory() -> None:
    """float32 for bfloat16: weights and cache."""
    words = ("--model", "llama3-8b", "--json", "--dtype")
    half, whole = (json.loads(_printed(*words, dtype)) for dtype in ("bfloat16", "float32"))
    assert whole["cache_bytes"] == 2 * half["cache_bytes"]
