"""Differences are found, noise is called noise, and intervals keep what they promise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster.errors import InvalidRequest
from loadgen.comparison import Difference, compare
from loadgen.report.comparison_page import comparison_page, unlike
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
        _write(Path(name), drawn_run(slowness=slowness, seed=len(name)))
    done = CliRunner().invoke(app, ["compare", "base", "slow", "same"])
    assert done.exit_code == 0, done.output
    assert "base, run  against  slow, run" in done.output
    assert "within noise" in done.output
    page = Path("comparison.html").read_text()
    assert page.count("<h2>Differences") == 1
    assert "higher" in page
    assert "differ in" not in done.output
    assert CliRunner().invoke(app, ["compare", "base"]).exit_code != 0


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sweeps leave them: by the folders they lie in, in every plot; one given twice is refused."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("x", "y")):
        _write(Path(name) / "run-001", drawn_run(seed=seed))
    done = CliRunner().invoke(app, ["compare", "x/run-001", "y/run-001"])
    assert done.exit_code == 0, done.output
    assert "x/run-001, run  against  y/run-001, run" in done.output
    over_time = Path("comparison.html").read_text().partition("Over time</h2>")[2]
    assert over_time.count("x/run-001<") == over_time.count("y/run-001<") > 0
    again = CliRunner().invoke(app, ["compare", "x/run-001", "x/run-001"])
    assert isinstance(again.exception, InvalidRequest)
    assert "given twice" in again.exception.message


def test_what_was_run_is_shown_and_its_differences_are_warned_of() -> None:
    """Model, shape and options of the load beside each other; other seeds are the same load."""
    base = drawn_run("a")
    (summary,) = base.summaries
    seeded = {**summary, "scenario": {**summary["scenario"], "seed": 2}}
    other = {**summary, "model_id": "another", "shape": "dense=4xh100", "scenario": {"rate": 20.0}}
    same, unlike_run = (
        dataclasses.replace(base, name=name, summaries=(own,)) for name, own in (("b", seeded), ("c", other))
    )
    assert unlike([base, same]) == []
    (words,) = unlike([base, unlike_run])
    for part in ("model_id <b>model</b> & co and another", "and dense=4xh100", "rate 10.0 and 20.0"):
        assert part in words
    content = comparison_page([base, same, unlike_run], [])
    assert content.warnings[0].startswith("a and c differ in")
    (table,) = next(section.tables for section in content.sections if section.title == "What was run")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["rate"] == ("10.00", "10.00", "20.00", "differs")
    assert rows["backend"][-1] == ""


def _write(folder: Path, run: Run) -> None:
    with ResultsFolder(folder) as results:
        for record in run.records:
            results.add(record)
        results.sum_up(run.summaries)
