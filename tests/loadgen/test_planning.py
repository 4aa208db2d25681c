"""Which shape to buy, and the published figures the model must agree with, or must not be tuned to."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen import options
from anabranch.cli.loadgen.command import app
from cluster import config as configuration
from cluster import hardware, prices
from cluster.errors import InvalidRequest
from cluster.telemetry_settings import CostConfig
from loadgen.metrics import Objectives
from loadgen.simulation import models
from loadgen.simulation.advice import advise
from loadgen.simulation.capacity import Setting, Traffic, best_within, bottleneck, saturated
from loadgen.simulation.machines import Efficiencies
from loadgen.simulation.validation import (
    CONFIGURATIONS,
    TRACES,
    Check,
    alone_shape,
    both,
    computed_checks,
    gain,
    per_dollar_range,
    simulated,
    split_shape,
)
from loadgen.simulation.validation_page import capacities, emulations, real_runs
from tests.loadgen.simulated import shape
from tests.tidy.source import ROOT

NO_BOUNDS = Objectives()
PRICES = """
[h20]
price_per_hour_usd = 0.01
price_date = 2026-01-02
source = "a list"
"""


def _setting(trace: str = "azure-conv", model: str = "llama3-70b", *, elsewhere: bool = False) -> Setting:
    return Setting(models.resolve(model), Traffic.of_means(*TRACES[trace]), prompts_elsewhere=elsewhere)


def test_costs_of_the_papers_configurations() -> None:
    """To the cent."""
    for model, (*_, split_usd, alone_usd) in CONFIGURATIONS.items():
        assert split_shape(model).price_per_hour_usd == pytest.approx(split_usd)
        assert alone_shape(model).price_per_hour_usd == pytest.approx(alone_usd)


def test_batches_of_the_papers_configurations() -> None:
    """LLaMA3-70B at (2,4) reaches 800; batches are near 2.39 times the homogeneous ones."""
    for model in CONFIGURATIONS:
        split, alone = both(model, "azure-conv", memory=0.9)
        assert 2.0 < split.batch / alone.batch < 2.75
    assert both("llama3-70b", "azure-conv", memory=0.9)[0].batch >= 800


def test_the_scheduler_reaches_the_papers_batch() -> None:
    """By the project's own scheduler and placement, sequence by sequence, not by a division."""
    summary = simulated("llama3-70b", is_split=True)
    assert summary["max_batch_rows"] >= 800
    assert summary["failed"] == 0


@pytest.mark.parametrize("trace", TRACES)
def test_first_principles_gain_for_models_without_groups(trace: str) -> None:
    """[c] +21 to +25 % for both, on every trace."""
    for model in ("llama-33b", "llama-65b"):
        assert 0.205 <= gain(model, trace) <= 0.255


def test_first_principles_order_for_llama3_70b() -> None:
    """[c] Kimi-Conv gains most, Azure-Code less, Azure-Conv loses: two H100s are compute-bound there."""
    conv, code, kimi = (gain("llama3-70b", trace) for trace in ("azure-conv", "azure-code", "kimi-conv"))
    assert -0.15 <= conv <= -0.05
    assert 0.10 <= code <= 0.17
    assert 0.195 <= kimi <= 0.23
    assert bottleneck(split_shape("llama3-70b"), _setting(elsewhere=True), NO_BOUNDS) == "compute"


def test_nothing_is_tuned_to_ninety_per_cent() -> None:
    """A roofline does not reach the paper's +90 %; nor either end of the first version's range per dollar."""
    assert max(gain(model, trace) for model in CONFIGURATIONS for trace in TRACES) < 0.3
    low, high = per_dollar_range()
    assert low < 1.48
    assert high < 12.1


def test_the_page_holds_what_the_command_writes() -> None:
    """Every row that needs no simulation, the last real runs and the last emulations are in
    docs/validation.md as computed now, disagreements too.
    """
    page = (ROOT / "docs" / "validation.md").read_text()
    assert all(line in page.splitlines() for line in (*capacities(), *real_runs(), *emulations()))
    rows: list[Check] = list(computed_checks())
    assert all(
        f"| {check.claim} | {check.source} | {check.stated} | {check.ours} |" in page for check in rows
    )
    assert {check.agrees for check in rows} == {True, False}


def test_azure_conv_says_do_not_disaggregate() -> None:
    """With all hardware of the catalogue, prompts on the same cluster; nor does the paper's shape pay."""
    advice = advise(hardware.built_in(), _setting(), NO_BOUNDS, 1)
    assert not advice.should_disaggregate
    assert advice.verdict.startswith("do not disaggregate")
    assert advice.break_even_usd
    split, alone = both("llama3-70b", "azure-conv", elsewhere=False)
    assert split.usd_per_mtok > alone.usd_per_mtok


def test_the_verdict_follows_from_what_is_cheaper() -> None:
    """H100 and H20 at the paper's prices, LLaMA3-70B, Kimi-Conv: the verdict names what is cheaper."""
    catalogue = {name: item for name, item in hardware.built_in().items() if name in ("h100", "h20")}
    setting = replace(_setting("kimi-conv", elsewhere=True), shard_tokens=None)
    advice = advise(catalogue, setting, NO_BOUNDS, 1)
    cheapest = min(advice.homogeneous[0].chosen.usd_per_mtok, advice.disaggregated[0].chosen.usd_per_mtok)
    chosen = advice.disaggregated[0] if advice.should_disaggregate else advice.homogeneous[0]
    assert chosen.chosen.usd_per_mtok == cheapest
    split, alone = both("llama3-70b", "kimi-conv")
    assert split.usd_per_mtok < alone.usd_per_mtok


@pytest.mark.parametrize("model", ["llama3-70b", "llama-65b"])
def test_tokens_per_dollar_are_equal_at_the_break_even_price(model: str) -> None:
    """With the attention device at that price the cheapest of all split shapes and the cheapest homogeneous
    one cost the same per token, whichever these then are; beside it the other way is cheaper.
    """
    catalogue = {name: item for name, item in hardware.built_in().items() if name in ("h100", "h20")}
    setting = _setting("azure-conv", model, elsewhere=True)
    advice = advise(catalogue, setting, NO_BOUNDS, 1)
    attention = advice.disaggregated[0].shape.attention
    assert attention is not None
    assert advice.break_even_usd
    for usd in advice.break_even_usd:
        verdicts = []
        for factor in (0.999, 1.0, 1.001):
            kind = attention.kind.model_copy(update={"price_per_hour_usd": factor * usd})
            again = advise({**catalogue, kind.name: kind}, setting, NO_BOUNDS, 1)
            split, alone = again.disaggregated[0].chosen, again.homogeneous[0].chosen
            assert split.usd_per_mtok == pytest.approx(alone.usd_per_mtok, rel=0.002)
            verdicts.append(again.should_disaggregate)
            if factor == 1:
                assert split.usd_per_mtok == pytest.approx(alone.usd_per_mtok)
        assert verdicts[0] != verdicts[2]


def test_a_device_is_not_priced_in_itself() -> None:
    """Where both sides of the best split shape are of one kind: no price of it changes anything where there
    is no other, else it is told in dollars.
    """
    known, setting = hardware.built_in(), _setting(elsewhere=True)
    one = advise({"h100": known["h100"]}, setting, NO_BOUNDS, 1)
    assert one.break_even_usd == ()
    assert one.verdict.endswith("no price of a h100 makes tokens per dollar equal")
    for advice in (one, advise(known, setting, NO_BOUNDS, 1)):
        assert "of a h100 (now 1.00)" not in advice.verdict
        assert not re.search(r"a (\S+) costs [\d. or]+ of a \1 ", advice.verdict)


def test_objectives_are_kept_and_not_by_more_than_needed() -> None:
    """The largest batch that keeps a TPOT: one row more would miss it. What nobody can keep gives nothing."""
    setting, where = _setting(elsewhere=True), shape("h100x4", None)
    within = best_within(where, setting, Objectives.parse("tpot:20"))
    most = saturated(where, setting)
    assert within is not None
    assert most is not None
    assert within.step_s <= 0.020 < most.step_s
    assert best_within(where, setting, Objectives.parse("tpot:1")) is None
    with pytest.raises(InvalidRequest, match="--slo"):
        advise(hardware.built_in(), setting, Objectives.parse("tpot:0.1"), 1)


def test_bottlenecks_are_named() -> None:
    """A long round trip is a latency floor; little cache beside the weights is memory."""
    slow = replace(_setting(elsewhere=True), efficiencies=Efficiencies(round_trip_s=2e-3))
    assert bottleneck(shape(), slow, NO_BOUNDS) == "latency floor"
    assert bottleneck(shape("h100x2", None), _setting(elsewhere=True), NO_BOUNDS) == "memory"


def test_bottlenecks_are_those_of_the_batch_within_the_objectives() -> None:
    """A TPOT of 10 ms leaves a batch of some dozens, of which weights and round trips take the time, where
    the full cache is bound by compute; `advise` says so.
    """
    setting, tight = _setting(), Objectives.parse("tpot:10")
    where = shape("h100x8", "h20x6")
    within = best_within(where, setting, tight)
    assert within is not None
    assert within.batch < 100
    assert bottleneck(where, setting, NO_BOUNDS) == "compute"
    assert bottleneck(where, setting, tight) in ("bandwidth", "latency floor")
    with pytest.raises(InvalidRequest, match="within the objectives"):
        bottleneck(where, setting, Objectives.parse("tpot:0.1"))
    advice = advise(hardware.built_in(), setting, tight, 1)
    for candidate in (*advice.homogeneous, *advice.disaggregated):
        assert candidate.bottleneck == bottleneck(candidate.shape, setting, tight)


def test_the_command_plans(tmp_path: Path) -> None:
    """`loadgen plan` prints shapes of both ways, what cannot be deployed, a verdict, and what each kind costs
    by whose word; also with own hardware, or prices of some of it.
    """
    text = (ROOT / "cluster" / "hardware.toml").read_text().replace("= 4.63", "= 0.01")
    (tmp_path / "hardware.toml").write_text(text)
    (tmp_path / "prices.toml").write_text(PRICES)
    common = ["plan", "--trace", "azure-conv", "--kinds", "h100,h20", "--prompts-elsewhere"]
    for own, *words in (
        ([], "do not disaggregate", "price of a h20: $4.63 an hour on 2024-05-01 (Lamina"),
        (["--hardware", str(tmp_path / "hardware.toml")], "h20x4 alone", "price of a h20: $0.01 an hour"),
        (
            ["--prices", str(tmp_path / "prices.toml")],
            "h20x4 alone",
            "price of a h20: $0.01 an hour on 2026-01-02 (a list)",
        ),
    ):
        done = CliRunner().invoke(app, [*common, *own])
        assert done.exit_code == 0, done.output
        assert all(each in done.output for each in (*words, "one device today"))


@pytest.mark.parametrize("has_times", [False, True])
def test_traces_are_planned_for_whole(has_times: bool, tmp_path: Path) -> None:
    """By the means of all their requests, with times or without; a rate is needed for the number of clusters
    alone.
    """
    file = tmp_path / "trace.csv"
    lengths = [(100 * number, number) for number in range(1, 301)]
    times = [f"2023-11-16 18:{number // 60:02}:{number % 60:02}" for number in range(300)]
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        + "\n".join(f"{at},{prompt},{output}" for at, (prompt, output) in zip(times, lengths, strict=True))
        if has_times
        else "\n".join(f"{prompt},{output}" for prompt, output in lengths)
    )
    common = ["plan", "--trace-file", str(file), "--kinds", "h100,h20"]
    for own, rate in (([], 1.0 if has_times else None), (["--rate", "2"], 2.0)):
        done = CliRunner().invoke(app, [*common, *own])
        assert done.exit_code == 0, done.output
        assert "prompts of 15,050.0 tokens" in done.output
        assert "outputs of 150.5" in done.output
        assert (f"how many {rate or 0:.2f} requests/s need" in done.output) == (rate is not None)


def test_servegens_clients_are_planned_for(tmp_path: Path) -> None:
    """For an hour, where nothing else is said."""
    trace = "0,2,1,Gamma,1,1\n600,2,1,Gamma,1,1\n1200,0,0,,0,0"
    (tmp_path / "chunk-0-trace.csv").write_text(trace)
    lengths = {"input_tokens": "{1000: 1.0}", "output_tokens": "{100: 1.0}"}
    (tmp_path / "chunk-0-dataset.json").write_text(json.dumps({"0": lengths}))
    done = CliRunner().invoke(app, ["plan", "--trace-file", str(tmp_path), "--kinds", "h100,h20"])
    assert done.exit_code == 0, done.output
    assert "prompts of 1,000.0 tokens" in done.output


def test_a_price_file_means_the_same_everywhere(tmp_path: Path) -> None:
    """It stands above the catalogue: of `run --shape`, of modelled clusters, and of those that run, whose
    other kinds keep the catalogue's prices; a whole catalogue is no price file.
    """
    file = tmp_path / "prices.toml"
    file.write_text(PRICES)
    paid = options.bill("dense=1xh100,attention=2xh20", file)
    assert paid is not None
    assert paid.attention is not None
    running = prices.in_force(
        CostConfig(dense="h100", attention="h20", prices=str(file)), configuration.load(None).placement
    )
    modelled = prices.repriced(hardware.built_in(), file)
    for kind, price, usd in (
        ("h100", paid.dense.price, 11.06),
        ("h20", paid.attention.price, 0.01),
    ):
        assert price == running[kind] == prices.of(modelled[kind])
        assert price.price_per_hour_usd == usd
    file.write_text(PRICES.replace("h20", "h2000"))
    with pytest.raises(InvalidRequest, match=r"prices of h2000.*does not have; it has h100, h20"):
        prices.repriced(hardware.built_in(), file)
    file.write_text((ROOT / "cluster" / "hardware.toml").read_text())
    with pytest.raises(InvalidRequest, match="no figures of hardware"):
        prices.repriced(hardware.built_in(), file)
