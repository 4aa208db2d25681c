"""A page shows the figures of the records, and its plots are of their numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import InvalidRequest
from loadgen.records import Outcome
from loadgen.report import ticks
from loadgen.report.content import Content, text
from loadgen.report.drawing import draw
from loadgen.report.page import render
from loadgen.report.plot import Line, Plot, Style
from loadgen.report.run_page import run_page
from loadgen.results import ResultsFolder, Run, read_run
from tests.loadgen.drawn_runs import drawn_run


def _plots(content: Content) -> dict[str, Plot]:
    return {plot.title: plot for section in content.sections for plot in section.plots}


def _area(line: Line) -> float:
    """Of a line of steps."""
    return float(np.diff(line.xs) @ np.array(line.ys[:-1]))


def test_distributions_are_the_latencies_of_completed_requests() -> None:
    """Half of a line lies below the median of the summary; its ends are the least and the largest value."""
    run = drawn_run()
    (summary,) = run.summaries
    plot = _plots(run_page(run))["Time to first token"]
    (line,) = plot.lines
    assert np.interp(0.5, line.ys, line.xs) == pytest.approx(summary["median_ttft_ms"], rel=1e-3)
    assert line.xs[-1] == pytest.approx(summary["max_ttft_ms"])
    assert {mark.name: mark.x for mark in plot.marks}["p95"] == pytest.approx(summary["p95_ttft_ms"])


def test_rates_over_time_hold_every_request_and_token() -> None:
    """The area below each line is the count that it shows a rate of."""
    run = drawn_run()
    plots = _plots(run_page(run))
    counted = {line.name: _area(line) for line in plots["Requests per second"].lines}
    assert counted == pytest.approx({"due": 200, "sent": 200, "completed": 196, "failed": 4})
    (tokens,) = plots["Output tokens per second"].lines
    assert _area(tokens) == pytest.approx(2000)


def test_what_is_under_way_is_what_was_sent_and_is_not_over() -> None:
    """Never below 0, 0 at the end, and at most what the summary says."""
    run = drawn_run()
    (line,) = _plots(run_page(run))["Requests under way"].lines
    assert min(line.ys) >= 0
    assert line.ys[-1] == 0
    assert max(line.ys) == run.summaries[0]["max_concurrent_requests"]


def test_members_are_drawn_by_worker() -> None:
    """Batches of dense workers, occupancy of those that keep blocks; without samples neither is drawn."""
    plots = _plots(run_page(drawn_run()))
    (batch,), (pool,) = plots["Batch size"].lines, plots["KV pool occupancy"].lines
    assert (batch.name, max(batch.ys)) == ("dense-0", 6)
    assert (pool.name, pool.ys[10]) == ("attention-0", 0.5)
    assert "Batch size" not in _plots(run_page(dataclasses.replace(drawn_run(), samples=())))


def test_a_page_asks_for_nothing_and_escapes_what_it_is_told() -> None:
    """No script, no address of anything, and no markup out of a model's name or an error."""
    page = render(run_page(drawn_run()))
    assert not re.search(r"<script|src=|href=|url\(|@import|https?:", page)
    assert "&lt;b&gt;model&lt;/b&gt; &amp; co" in page
    assert "<b>model" not in page
    assert "UNAVAILABLE: &lt;gone&gt;" in page


def test_every_figure_is_in_the_page_with_its_meaning() -> None:
    """Those of the summary, each as the page writes numbers."""
    run = drawn_run()
    content = run_page(run)
    shown = {figure.key: figure for figure in content.figures}
    for key in ("median_ttft_ms", "output_throughput", "littles_law_residual", "usd_per_mtok", "errors"):
        assert shown[key].texts == (text(run.summaries[0][key]),)
        assert shown[key].meaning
    assert content.warnings == tuple(run.summaries[0]["warnings"])


def test_energy_stands_beside_dollars() -> None:
    """With the words that it was not measured; a run that was summed up before it was told has none."""
    run = drawn_run()
    (summary,) = run.summaries
    (cost,) = (section for section in run_page(run).sections if section.title == "Cost")
    assert "power is rated, not measured" in cost.words
    assert ("joules per output token", text(summary["joules_per_output_token"])) in cost.tables[0].rows
    older = {key: value for key, value in summary.items() if key != "joules_per_output_token"}
    content = run_page(dataclasses.replace(run, summaries=(older,)))
    (cost,) = (section for section in content.sections if section.title == "Cost")
    assert ("joules per output token", text(None)) in cost.tables[0].rows


def test_a_run_of_nothing_has_a_page() -> None:
    """Stopped before its first answer, or before its first stage."""
    run = drawn_run(requests=3)
    lost = [
        dataclasses.replace(r, outcome=Outcome.INTERRUPTED, deltas_s=(), delta_tokens=()) for r in run.records
    ]
    for records, summaries in ((tuple(lost), run.summaries), ((), ())):
        page = render(run_page(Run("nothing", records, summaries, ())))
        assert page.startswith("<!doctype html>")


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("style", Style)
def test_a_drawing_is_well_formed_and_stays_inside(style: Style, is_log: bool) -> None:
    """Every point of a path lies within the picture, also where all values are one."""
    for xs, ys in (((1.0, 10.0, 1000.0), (0.0, 5.0, 2.0)), ((4.0, 4.0), (0.0, 0.0))):
        line = Line("a & b", xs, ys, style)
        svg = ElementTree.fromstring(draw(Plot("a < b", "", "x", "y", (line,), is_log=is_log)))
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        (path,) = svg.iter("path")
        for x, y in re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path.attrib["d"]):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_ticks_are_round_and_few() -> None:
    """Within the axis, at even distances."""
    assert ticks.linear(0.0, 97.0, 4) == pytest.approx((0, 25, 50, 75))
    assert ticks.linear(0.0, 1.0, 4) == pytest.approx((0, 0.25, 0.5, 0.75, 1))
    assert ticks.logarithmic(3.0, 600.0, 7) == pytest.approx((5, 10, 20, 50, 100, 200, 500))
    assert len(ticks.logarithmic(1e-6, 1e9, 7)) <= 7
    assert [ticks.text(value) for value in (0.25, 12.0, 4000.0, 1.5e6)] == ["0.25", "12", "4,000", "1.5M"]


def test_a_folder_holds_a_run(tmp_path: Path) -> None:
    """What is written is what is read, members' samples too."""
    run = drawn_run(requests=5)
    with ResultsFolder(tmp_path / "a run") as results:
        for record in run.records:
            results.add(record)
        for sample in run.samples:
            results.add_sample(sample)
        results.sum_up(run.summaries)
    read = read_run(tmp_path / "a run")
    assert (read.name, read.samples) == ("a run", run.samples)
    assert [record.session for record in read.records] == [0, 1, 2, 3, 4]
    assert read.summaries[0] == json.loads(json.dumps(run.summaries[0]))
    (tmp_path / "a run" / "members.jsonl").write_text('{"at_s": 1}\n')
    with pytest.raises(InvalidRequest, match="members' samples"):
        read_run(tmp_path / "a run")
