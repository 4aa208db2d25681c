"""What two papers state beside what this project's model gives: the rows of `docs/validation.md`.

Nothing here is fitted; a verdict follows from the numbers on its row and may be that we do not agree.
`validation_page` prints them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from cluster import config as configuration
from cluster import hardware
from cluster.perfmodel import (
    attention_step_floor_s,
    dense_step_floor_s,
    minimum_bandwidth_bytes_per_s,
    requests_held,
)
from loadgen.metrics import Summary
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.advice import ATTENTION_DEVICES, DENSE_DEVICES
from loadgen.simulation.capacity import Point, Setting, Traffic, at_batch, batch_most, saturated
from loadgen.simulation.machines import Efficiencies, Shape, Side
from loadgen.simulation.simulation import LARGE, STEP_TOKENS_ELSEWHERE, SimulatedCluster, Simulation
from loadgen.simulation.steps import Switches

LAMINA = "Lamina, arXiv 2405.01814"
LAMINA_COMPUTED = "computed from Lamina's constants"
INFINITE = "Infinite-LLM, arXiv 2401.02669"

TRACES = {
    "azure-conv": (1154.7, 211.1),
    "azure-code": (2047.8, 27.9),
    "kimi-conv": (12035.1, 342.6),
    "kimi-ta": (8560.0, 182.1),
}
"""Mean prompt and output tokens, as the paper's table has them."""

CONFIGURATIONS = {
    "llama-33b": (1, 2, 2, 20.32, 22.12),
    "llama-65b": (2, 4, 4, 40.64, 44.24),
    "llama3-70b": (2, 4, 4, 40.64, 44.24),
}
"""Computation devices, memory devices, devices of the homogeneous peer; prices per hour of both."""

PER_DOLLAR = (1.48, 12.1)
"""Tokens per dollar of the split shape over the homogeneous one's: the first version's range."""

_CONTEXT = 4096
_ROUNDING = 0.005
"""Of shares that are stated in whole per cent."""

_BATCHES_WITHIN = 0.15
"""What is near enough for a ratio that depends on the other system's spare memory."""

_USERS, _REQUESTS = 1200, 2400


@dataclass(frozen=True, slots=True)
class Check:
    """One claim."""

    claim: str
    source: str
    stated: str
    ours: str
    agrees: bool
    because: str = ""
    """Why not, or how far it goes."""


def split_shape(model: str) -> Shape:
    """Lamina's configuration for a model: H100 and H20."""
    catalogue, (dense, attention, *_) = hardware.built_in(), CONFIGURATIONS[model]
    return Shape(Side(catalogue["h100"], dense), Side(catalogue["h20"], attention))


def alone_shape(model: str) -> Shape:
    """Its homogeneous peer."""
    return Shape(Side(hardware.built_in()["h100"], CONFIGURATIONS[model][2]))


def lamina_setting(model: str, trace: str, *, elsewhere: bool = True, memory: float = 1.0) -> Setting:
    """As the paper measures: heads dealt over devices, prompts computed elsewhere, all memory used."""
    return Setting(
        models.resolve(model),
        Traffic.of_means(*TRACES[trace]),
        Efficiencies(memory=memory),
        prompts_elsewhere=elsewhere,
        shard_tokens=None,
    )


def both(model: str, trace: str, *, elsewhere: bool = True, memory: float = 1.0) -> tuple[Point, Point]:
    """(split, homogeneous) at saturation."""
    setting = lamina_setting(model, trace, elsewhere=elsewhere, memory=memory)
    split, alone = saturated(split_shape(model), setting), saturated(alone_shape(model), setting)
    assert split is not None, "the paper's shapes hold their models"
    assert alone is not None, "the paper's shapes hold their models"
    return split, alone


def gain(model: str, trace: str, *, elsewhere: bool = True) -> float:
    """Throughput of the split shape over the homogeneous one's, less 1."""
    split, alone = both(model, trace, elsewhere=elsewhere)
    return split.tokens_per_s / alone.tokens_per_s - 1


def overlap_gain(model: str) -> float:
    """Largest share of a step that overlap saves over all batches that fit, at a context of 4,096."""
    shape, best = split_shape(model), 0.0
    traffic = Traffic(_CONTEXT, 1, _CONTEXT)
    with_it, without = (
        Setting(
            models.resolve(model),
            traffic,
            Efficiencies(memory=1.0),
            Switches(overlaps, staggers=False),
            True,
            None,
        )
        for overlaps in (True, False)
    )
    for batch in range(1, int(batch_most(shape, with_it)) + 1):
        saved = 1 - at_batch(shape, with_it, batch).step_s / at_batch(shape, without, batch).step_s
        best = max(best, saved)
    return best


def least_bandwidth_gb_per_s(model: str, context_tokens: int) -> float:
    """The most of Lamina's minimum bandwidth over batches to 300 at DOP (1, 1)."""
    catalogue, shape = hardware.built_in(), models.resolve(model).shape
    dense, attention = catalogue["h100"].speed, catalogue["h20"].speed
    return max(
        minimum_bandwidth_bytes_per_s(
            shape,
            batch,
            dense_step_floor_s(shape, batch, dense),
            attention_step_floor_s(shape, batch, context_tokens, attention),
        )
        / 1e9
        for batch in range(1, 301)
    )


@cache
def simulated(model: str, *, is_split: bool) -> Summary:
    """A closed loop that fills the cache, with Azure-Conv's fit, by the project's own scheduler."""
    shape = split_shape(model) if is_split else alone_shape(model)
    settings = LARGE | {"dense.step_tokens": STEP_TOKENS_ELSEWHERE}
    resolved = models.resolve(model)
    cluster = SimulatedCluster(resolved, shape, configuration.load(None, settings), prompts_elsewhere=True)
    scenario = Scenario(workload="azure-conv", concurrency=(_USERS,), requests=_REQUESTS)
    simulation = Simulation(cluster, scenario, timeout_s=3600)
    return simulation.run(lambda _: None, lambda _: True)[0]


def computed_checks() -> Iterator[Check]:
    """Claims that equations decide."""
    yield from _costs()
    yield from _memory()
    yield from _network()
    yield from _gains()
    yield from _first_version()
    yield from _infinite()


def simulated_checks() -> Iterator[Check]:
    """Claims that the project's scheduler and placement decide; takes a minute."""
    split, alone = (simulated("llama3-70b", is_split=is_split) for is_split in (True, False))
    yield Check(
        "llama3-70b at (2,4) reaches batch, by the project's scheduler and placement",
        LAMINA,
        "800",
        f"{split['max_batch_rows']}, {split['steps']:,} steps",
        split["max_batch_rows"] >= 800,
    )
    ratio = split["max_batch_rows"] / alone["max_batch_rows"]
    yield Check(
        "batch, split over homogeneous, by the same",
        LAMINA,
        "2.39 x (mean)",
        f"{ratio:.2f} x (largest)",
        abs(ratio / 2.39 - 1) < _BATCHES_WITHIN,
    )


def _costs() -> Iterator[Check]:
    for model, (_, _, _, split_usd, alone_usd) in CONFIGURATIONS.items():
        ours = (split_shape(model).price_per_hour_usd, alone_shape(model).price_per_hour_usd)
        yield Check(
            f"{model}: {split_shape(model)}, and {alone_shape(model)}, cost",
            LAMINA,
            f"${split_usd:.2f}/h, ${alone_usd:.2f}/h",
            f"${ours[0]:.2f}/h, ${ours[1]:.2f}/h",
            max(abs(ours[0] - split_usd), abs(ours[1] - alone_usd)) < 0.005,
        )


def _memory() -> Iterator[Check]:
    shape = models.resolve("llama3-70b").shape
    held = requests_held(hardware.built_in()["h100"].memory_bytes, 8192, shape)
    yield Check(
        "requests of 8,192 tokens of llama3-70b in one H100",
        LAMINA,
        "about 30",
        f"{held}",
        abs(held - 30) <= 1,
    )
    batch = both("llama3-70b", "azure-conv", memory=0.9)[0].batch
    yield Check(
        "llama3-70b at (2,4) reaches batch",
        LAMINA,
        "800",
        f"{batch:.0f} (closed form, Azure-Conv)",
        batch >= 800,
    )
    pairs = [both(model, "azure-conv", memory=0.9) for model in CONFIGURATIONS]
    ratios = [first.batch / second.batch for first, second in pairs]
    yield Check(
        "batch, split over homogeneous",
        LAMINA,
        "2.39 x (mean)",
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} x",
        all(abs(ratio / 2.39 - 1) < _BATCHES_WITHIN for ratio in ratios),
        "nine tenths of the memory are used on both sides, as vLLM does",
    )


def _network() -> Iterator[Check]:
    at = {context: least_bandwidth_gb_per_s("llama3-70b", context) for context in (1024, 4096, 8192)}
    yield Check(
        "llama3-70b at DOP (1,1): bandwidth needed up to batch 300",
        LAMINA,
        "30 GB/s or less",
        ", ".join(f"{value:.1f} at {context:,} tokens" for context, value in at.items()),
        max(at.values()) <= 30,
        "the paper's context is not given; shorter contexts need more",
    )
    yield Check(
        "the same, one figure",
        LAMINA_COMPUTED,
        "21.7 GB/s",
        f"between {at[8192]:.1f} and {at[4096]:.1f}",
        at[8192] < 21.7 < at[4096],
        "bracketed by contexts of 8,192 and 4,096",
    )
    saved = {model: overlap_gain(model) for model in ("llama-65b", "llama3-70b")}
    yield Check(
        "overlap shortens a step at 4,096 tokens by at most",
        LAMINA,
        "13.2 % (llama-65b), 3.5 % (llama3-70b)",
        ", ".join(f"{share:.1%} ({model})" for model, share in saved.items()),
        abs(saved["llama-65b"] - 0.132) < 0.02 and abs(saved["llama3-70b"] - 0.035) < 0.02,
        "sign and order are theirs, the size is not: our keys and values go at the line's whole speed",
    )


def _gains() -> Iterator[Check]:
    bounds = {
        ("llama-33b", "azure-conv"): (0.21, 0.25),
        ("llama-65b", "azure-conv"): (0.21, 0.25),
        ("llama3-70b", "kimi-conv"): (0.20, 0.22),
        ("llama3-70b", "azure-code"): (0.11, 0.13),
        ("llama3-70b", "azure-conv"): (-0.15, -0.06),
    }
    for (model, trace), (low, high) in bounds.items():
        ours = gain(model, trace)
        is_within = low - _ROUNDING <= ours <= high + _ROUNDING
        yield Check(
            f"{model}, {trace}: throughput, split over homogeneous",
            LAMINA_COMPUTED,
            f"{low:+.0%} to {high:+.0%}",
            f"{ours:+.1%}; {gain(model, trace, elsewhere=False):+.1%} with prompts on the same cluster",
            is_within,
            "" if is_within else "same sign and order; ours hides keys and values behind attention",
        )
    most = max(gain(model, trace) for model in CONFIGURATIONS for trace in TRACES)
    yield Check(
        "throughput over vLLM at similar cost",
        LAMINA,
        "+16.1 % to +90.1 %",
        f"{most:+.1%} at most",
        most >= 0.9,
        "a roofline does not reach it, and nothing is tuned to; theirs is measured against a real vLLM",
    )
    ratio = hardware.built_in()["h20"].price_per_hour_usd / hardware.built_in()["h100"].price_per_hour_usd
    yield Check(
        "(2,4) is cheaper than 4 devices while a memory device costs less than half of a computation device",
        LAMINA_COMPUTED,
        "ratio 0.419",
        f"ratio {ratio:.3f}",
        abs(ratio - 0.419) < 0.001,
    )


def _first_version() -> Iterator[Check]:
    low, high = per_dollar_range()
    yield Check(
        "throughput per dollar, split over homogeneous (first version's abstract)",
        LAMINA,
        " to ".join(f"{end} x" for end in PER_DOLLAR),
        f"{low:.2f} x to {high:.2f} x at the paper's shapes",
        low >= PER_DOLLAR[0] and high >= PER_DOLLAR[1],
        f"neither end at these shapes; {_beyond()}",
    )


def per_dollar_range() -> tuple[float, float]:
    """Least and most over models and traces, Kimi-TA by its means alone."""
    values = []
    for model in CONFIGURATIONS:
        cost = alone_shape(model).price_per_hour_usd / split_shape(model).price_per_hour_usd
        values += [(1 + gain(model, trace)) * cost for trace in TRACES]
    return min(values), max(values)


def _beyond() -> str:
    """Which shapes of the catalogue come nearest to each end."""
    found = per_dollar_over_catalogue()
    nearest = (min((abs(ratio / end - 1), ratio, where) for ratio, where in found) for end in PER_DOLLAR)
    ends = " and ".join(f"{ratio:.2f} x ({where})" for _, ratio, where in nearest)
    return (
        f"of the catalogue's, with attention workers beside the same dense devices, {ends} are nearest to "
        f"the ends; all: {min(found)[0]:.2f} x to {max(found)[0]:.2f} x"
    )


@cache
def per_dollar_over_catalogue() -> tuple[tuple[float, str], ...]:
    """(tokens per dollar of a split shape over those of its dense devices alone, where) for every pair of
    networked kinds, numbers of them, model and trace where both serve.
    """
    kinds = [kind for kind in hardware.built_in().values() if kind.network_bytes_per_s is not None]
    found: list[tuple[float, str]] = []
    for model, trace, dense, devices in itertools.product(CONFIGURATIONS, TRACES, kinds, DENSE_DEVICES):
        setting, side = lamina_setting(model, trace), Side(dense, devices)
        alone = saturated(Shape(side), setting)
        if alone is None:
            continue
        for attention, workers in itertools.product(kinds, ATTENTION_DEVICES):
            shape = Shape(side, Side(attention, workers))
            split = saturated(shape, setting)
            if split is not None:
                found.append((alone.usd_per_mtok / split.usd_per_mtok, f"{model}, {trace}, {shape}"))
    return tuple(found)


def _infinite() -> Iterator[Check]:
    shape = models.resolve("llama3-70b").shape
    query_bytes = 2 * shape.hidden_size * shape.element_bytes * shape.layers
    ratio = _CONTEXT * shape.kv_token_bytes / query_bytes
    yield Check(
        "queries travel instead of the cache: bytes saved for a row at 4,096 tokens",
        INFINITE,
        "less than the cache, whatever its length",
        f"{ratio:,.0f} times less",
        ratio > 1,
    )
    model, dense = models.resolve("llama3-70b").shape, hardware.built_in()["h100"]
    assert dense.network_bytes_per_s is not None, "the built-in catalogue has it"
    step_s = dense_step_floor_s(model, 1, dense.speed, 2)
    share = {
        tokens: tokens * model.kv_token_bytes / dense.network_bytes_per_s / step_s for tokens in (16, 32)
    }
    yield Check(
        "moving cache beside decoding: 16 tokens a step are hidden, 32 are not (8.6 %)",
        f"{INFINITE}, by reading notes",
        "0 %, 8.6 %",
        ", ".join(f"{tokens} tokens take {part:.1%} of the shortest step" for tokens, part in share.items()),
        share[16] <= 1 < share[32],
        "by bandwidth alone both are hidden: theirs has a cost that our model does not know",
    )
