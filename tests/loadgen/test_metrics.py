"""Figures equal hand calculations, and doubtful ones are called doubtful."""

import dataclasses

import numpy as np
import pytest

from cluster.errors import InvalidRequest
from loadgen.arrivals import Limit, poisson
from loadgen.metrics import Facts, Objectives, definition, percentile_note, summarize
from loadgen.records import Outcome, Record
from tests.loadgen.test_records import LOST, WHOLE

FACTS = Facts("run", 0.0, planned=4, client_cpu_share=0.1, request_rate=1.0)


def _record(sent_s: float, stay_s: float, *, late_s: float = 0.0, tokens: int = 3) -> Record:
    """Completed; the first token after half of the time, the others at even gaps."""
    deltas = tuple(np.linspace(sent_s + stay_s / 2, sent_s + stay_s, tokens).tolist())
    return dataclasses.replace(
        WHOLE,
        turn=0,
        intended_s=sent_s - late_s,
        sent_s=sent_s,
        first_token_s=deltas[0],
        last_token_s=deltas[-1],
        ended_s=sent_s + stay_s,
        prompt_tokens=10,
        asked_output_tokens=tokens,
        output_tokens=tokens,
        cached_tokens=0,
        deltas_s=deltas,
        delta_tokens=(1,) * tokens,
    )


RECORDS = [
    _record(0.0, 1.0),
    _record(1.0, 2.0, late_s=0.1),
    dataclasses.replace(_record(2.0, 0.5), outcome=Outcome.FAILED, error="UNAVAILABLE: gone"),
]


def test_figures_by_hand() -> None:
    """Two completed requests and a failed one in three seconds, one planned and never sent."""
    summary = summarize(RECORDS, FACTS)
    assert (summary["completed"], summary["failed"], summary["unsent"]) == (2, 1, 1)
    assert summary["errors"] == {"UNAVAILABLE": 1}
    assert summary["duration"] == 3.0
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (20, 6)
    assert summary["request_throughput"] == pytest.approx(2 / 3)
    assert summary["output_throughput"] == pytest.approx(2.0)
    assert summary["total_token_throughput"] == pytest.approx(26 / 3)
    assert summary["mean_ttft_ms"] == pytest.approx(750)
    assert summary["median_tpot_ms"] == pytest.approx(375)
    assert summary["mean_itl_ms"] == pytest.approx(375)
    assert summary["p99_e2el_ms"] == pytest.approx(1990)
    assert summary["max_send_lag_ms"] == pytest.approx(100)
    assert summary["max_concurrent_requests"] == 2
    assert summary["mean_dense_ms"] == pytest.approx(400)
    assert summary["request_goodput"] is None


def test_rates_of_sending_by_hand() -> None:
    """Three sends due over 2 s that took 3 s: one a second asked for, two thirds achieved, and a warning."""
    records = [_record(sent_s, 0.1, late_s=late_s) for sent_s, late_s in ((0, 0), (1.5, 0.5), (3, 1))]
    summary = summarize(records, FACTS)
    assert summary["asked_rate"] == pytest.approx(1.0)
    assert summary["achieved_rate"] == pytest.approx(2 / 3)
    assert any("66.7% of the asked rate" in warning for warning in summary["warnings"])
    assert any("late" in warning for warning in summary["warnings"])


def test_goodput_counts_who_kept_every_objective() -> None:
    """TTFTs are 500 and 1,000 ms, TPOTs 250 and 500; the bound itself is kept."""
    for text, good in (("ttft:500", 1), ("ttft:1000,tpot:500", 2), ("ttft:1000,tpot:400,e2el:1000", 1)):
        facts = dataclasses.replace(FACTS, objectives=Objectives.parse(text))
        assert summarize(RECORDS, facts)["request_goodput"] == pytest.approx(good / 3), text


@pytest.mark.parametrize("text", ["ttft", "ttft:fast", "itl:3"])
def test_objectives_that_are_none_are_refused(text: str) -> None:
    """Unknown names and numbers that are none."""
    with pytest.raises(InvalidRequest):
        Objectives.parse(text)


def _served(rate: float, capacity: float, duration_s: float = 200.0) -> list[Record]:
    """Poisson arrivals at one server that takes 1 / capacity seconds for each, in turn."""
    free_s, records = 0.0, []
    for sent_s in poisson(rate).times_s(np.random.default_rng(5), Limit(duration_s=duration_s)).tolist():
        free_s = max(free_s, sent_s) + 1 / capacity
        records.append(_record(sent_s, free_s - sent_s))
    return records


def test_littles_law_holds_in_a_steady_state_and_tells_overload() -> None:
    """A queue below its capacity is off by under 3 %; one above it piles up, and a warning says so."""
    steady = summarize(_served(2.0, 5.0), FACTS)
    assert abs(steady["littles_law_residual"]) < 0.03
    assert steady["mean_concurrent_requests"] == pytest.approx(
        2 / 5 + (2 / 5) ** 2 / 2 / (1 - 2 / 5), rel=0.15
    )
    assert not any("steady" in warning for warning in steady["warnings"])
    crowded = summarize(_served(6.0, 5.0), FACTS)
    assert crowded["littles_law_residual"] < -0.1
    assert any("the load is too high" in warning for warning in crowded["warnings"])


def test_what_piles_up_is_told_from_chance() -> None:
    """A queue below its capacity piles up nothing beyond chance; above it, what it cannot serve."""
    assert summarize(_served(2.0, 5.0), FACTS)["piled_up_share"] == 0
    assert summarize(_served(10.0, 5.0), FACTS)["piled_up_share"] == pytest.approx(0.5, abs=0.1)
    closed = dataclasses.replace(FACTS, concurrency=1)
    assert summarize(_served(10.0, 5.0), closed)["piled_up_share"] is None


def test_the_share_of_good_requests_counts_failures() -> None:
    """One of three keeps a TTFT of 700 ms: one is slower, one failed."""
    facts = dataclasses.replace(FACTS, objectives=Objectives.parse("ttft:700"))
    assert summarize(RECORDS, facts)["goodput_share"] == pytest.approx(1 / 3)
    assert summarize(RECORDS, FACTS)["goodput_share"] is None


def test_a_percentile_of_few_samples_is_called_so() -> None:
    """Ten samples must lie beyond it: 1,000 for p99."""
    assert percentile_note(99, 1000) is None
    assert percentile_note(99, 999) is not None
    assert "p99 rests on 2.4 of 240 requests: 1,000" in (percentile_note(99, 240) or "")
    (warning,) = summarize([_record(place, 0.1) for place in range(150)], FACTS)["warnings"]
    assert warning.startswith("p95")


def test_a_busy_client_and_short_outputs_are_told() -> None:
    """Times of a sender without spare time are not to be trusted; outputs that end early are no load."""
    short = [dataclasses.replace(_record(place, 0.1), asked_output_tokens=30) for place in range(3)]
    warnings = summarize(short, dataclasses.replace(FACTS, client_cpu_share=0.9))["warnings"]
    assert any("busy 90%" in warning for warning in warnings)
    assert any("9 of 90 output tokens" in warning for warning in warnings)


@pytest.mark.parametrize("records", [[], [dataclasses.replace(LOST, turn=0)], RECORDS])
def test_every_figure_has_a_definition_and_none_is_made_up(records: list[Record]) -> None:
    """Each key is defined; where nothing was measured a figure is None, never 0 or a fault."""
    summary = summarize(records, FACTS)
    for key in summary:
        assert definition(key), key
    if not any(record.outcome is Outcome.COMPLETED for record in records):
        assert summary["mean_ttft_ms"] is None
        assert summary["completed"] == 0
    for vllm in (
        "mean_ttft_ms",
        "median_tpot_ms",
        "p99_itl_ms",
        "std_e2el_ms",
        "request_goodput",
        "duration",
    ):
        assert vllm in summary
