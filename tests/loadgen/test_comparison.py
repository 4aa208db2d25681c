"""Differences are found, noise is called noise, and intervals keep what they promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster.errors import InvalidRequest
from loadgen.comparison import Difference, compare
from loadgen.results import ResultsFolder, Run
from tests.loadgen.drawn_runs import drawn_run


def _differences(base: Run, other: Run) -> dict[str, Difference]:
    (pair,) = compare(base, other)
    return {difference.key: difference for difference in pair.differences}


def test_a_difference_is_found_and_sized() -> None:
    """A server that takes half as long again: the interval holds 50 %, not 0."""
    found = _differences(drawn_run(), drawn_run(slowness=1.5, seed=2))
    for key in ("mean_ttft_ms", "median_tpot_ms", "mean_itl_ms", "mean_e2el_ms"):
        difference = found[key]
        assert difference.low is not None
        assert difference.high is not None
        assert 0.3 < difference.low < 0.5 < difference.high < 0.7, key
        assert difference.verdict.endswith("higher")
    assert found["request_throughput"].verdict == "within noise"


def test_noise_is_called_noise() -> None:
    """Of twenty pairs of the same kind about one in twenty differs at 95 %: at most four of twenty."""
    runs = [drawn_run(seed=seed) for seed in range(21)]
    verdicts = [_differences(runs[0], run)["mean_ttft_ms"].verdict for run in runs[1:]]
    pairs = [_differences(a, b)["mean_ttft_ms"].verdict for a, b in zip(runs[1::2], runs[2::2], strict=True)]
    assert sum(verdict != "within noise" for verdict in pairs) <= 2
    assert "within noise" in verdicts


def test_a_gap_counts_with_its_request() -> None:
    """Gaps of one request are alike: drawn alone they would promise far too much. The mean ITL's interval is
    about as wide as that of TPOT, of which each request has one.
    """
    found = _differences(drawn_run(), drawn_run(seed=2))

    def width(key: str) -> float:
        return (found[key].high or 0.0) - (found[key].low or 0.0)

    assert width("mean_itl_ms") == pytest.approx(width("mean_tpot_ms"), rel=0.2)


def test_stages_meet_by_name() -> None:
    """Or the only ones of both; where none do, that is said. Too few requests give no interval."""
    one, other = drawn_run("a", stage="concurrency 1"), drawn_run("b", stage="concurrency 2")
    (pair,) = compare(one, other)
    assert (pair.base, pair.other) == ("a, concurrency 1", "b, concurrency 2")
    two = dataclasses.replace(one, summaries=one.summaries * 2)
    with pytest.raises(InvalidRequest, match="no stage in common"):
        compare(two, other)
    few = _differences(drawn_run(requests=1), drawn_run(requests=1))
    assert {difference.verdict for difference in few.values()} == {"cannot be told"}


def test_the_command_writes_a_page_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs, each against the first."""
    monkeypatch.chdir(tmp_path)
    for name, slowness in (("base", 1.0), ("slow", 1.5), ("same", 1.0)):
        run = drawn_run(slowness=slowness, seed=len(name))
        with ResultsFolder(Path(name)) as results:
            for record in run.records:
                results.add(record)
            results.sum_up(run.summaries)
    done = CliRunner().invoke(app, ["compare", "base", "slow", "same"])
    assert done.exit_code == 0, done.output
    assert "base, run  against  slow, run" in done.output
    assert "within noise" in done.output
    page = Path("comparison.html").read_text()
    assert page.count("<h2>Differences") == 1
    assert "higher" in page
    assert CliRunner().invoke(app, ["compare", "base"]).exit_code != 0
