"""Which shape to buy, and the published figures the model must agree with, or must not be tuned to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster import hardware
from cluster.errors import InvalidRequest
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
    assert summary["simulation"]["max_batch_rows"] >= 800
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
    assert bottleneck(split_shape("llama3-70b"), _setting(elsewhere=True)) == "compute"


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
    assert advice.break_even is not None
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


def test_tokens_per_dollar_are_equal_at_the_break_even_price() -> None:
    """With the attention device at that price, split and homogeneous cost the same per token."""
    catalogue = {name: item for name, item in hardware.built_in().items() if name in ("h100", "h20")}
    setting = _setting("kimi-conv", "llama-65b", elsewhere=True)
    advice = advise(catalogue, setting, NO_BOUNDS, 1)
    (split,), (alone,) = advice.disaggregated, advice.homogeneous
    assert advice.break_even is not None
    assert split.shape.attention is not None
    dense_usd = split.shape.dense.kind.price_per_hour_usd
    kind = split.shape.attention.kind.model_copy(update={"price_per_hour_usd": advice.break_even * dense_usd})
    priced = replace(split.shape, attention=replace(split.shape.attention, kind=kind))
    again = saturated(priced, setting)
    assert again is not None
    assert again.usd_per_mtok == pytest.approx(alone.chosen.usd_per_mtok)


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
    assert bottleneck(shape(), slow) == "latency floor"
    assert bottleneck(shape("h100x2", None), _setting(elsewhere=True)) == "memory"


def test_the_command_plans(tmp_path: Path) -> None:
    """`loadgen plan` prints shapes of both ways, what cannot be deployed, a verdict; also with own prices."""
    text = (ROOT / "cluster" / "hardware.toml").read_text().replace("= 4.63", "= 0.01")
    (tmp_path / "prices.toml").write_text(text)
    common = ["plan", "--trace", "azure-conv", "--kinds", "h100,h20", "--prompts-elsewhere"]
    for prices, words in (
        ([], "do not disaggregate"),
        (["--prices", str(tmp_path / "prices.toml")], "h20x4 alone"),
    ):
        done = CliRunner().invoke(app, [*common, *prices])
        assert done.exit_code == 0, done.output
        assert words in done.output
        assert "one device today" in done.output
