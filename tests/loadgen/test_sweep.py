"""Sweeps find what is known: the saturation of a queue and of the simulator, and the better settings."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from anabranch.cli.loadgen.command import app
from cluster.errors import ConfigError, InvalidRequest
from loadgen.metrics import FIGURES, Objectives
from loadgen.report.drawing import draw_tiles
from loadgen.report.page import render
from loadgen.report.plot import Tiles
from loadgen.report.sweep_page import sweep_page
from loadgen.results import PAGE, read_summaries
from loadgen.scenario import Scenario
from loadgen.simulation.machines import Shape
from loadgen.simulation.simulation import SimulatedCluster
from loadgen.sweep.load import Course, LoadKind, Point, Standard
from loadgen.sweep.results import POINTS
from loadgen.sweep.saturation import Saturation
from loadgen.sweep.simulated import simulated
from loadgen.sweep.space import Choice, Span, grid, parse
from loadgen.sweep.sweep import Loads, Sweep
from tests.loadgen.paced import MODEL, OpenAiServer, Script
from tests.loadgen.queueing import OUTPUT_TOKENS, queue, swept_queues
from tests.loadgen.simulated import cluster, shape, simulate

PLACES, STAY_S = 8, 0.5
CAPACITY = PLACES / STAY_S


def _swept(loads: Loads, standard: Standard, scenario: Scenario, places: int = PLACES) -> Course:
    points: list[Point] = []
    sweep = Sweep(scenario, loads, standard, points.append, lambda: True)
    course = sweep.run(queue(places, STAY_S, standard.objectives, {}))
    assert course.points == tuple(points)
    return course


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.floats(0.01, 0.5))
def test_a_search_ends_at_the_boundary(capacity: float, first: float, precision: float) -> None:
    """Whatever it begins with: borne below, refused above, as near as asked; none is borne where 1/256 of the
    first is too much.
    """
    search, tried = Saturation(first, precision), 0
    while (load := search.next()) is not None:
        search.told(load, is_borne=load <= capacity)
        tried += 1
        assert tried <= search.tries_most
    if search.borne is None:
        assert capacity < first / 128
    else:
        assert search.borne <= capacity
        assert search.refused is not None
        assert capacity < search.refused
        is_near = search.refused - search.borne <= precision * search.borne
        assert is_near or tried == search.tries_most


@given(st.integers(1, 5000), st.integers(1, 64))
def test_users_are_whole(capacity: int, first: int) -> None:
    """With a precision below one user, the exact number."""
    search = Saturation(first, 1e-6, is_whole=True, tries_most=64)
    while (load := search.next()) is not None:
        assert load == int(load) >= 1
        search.told(load, is_borne=load <= capacity)
    assert search.borne == capacity


@pytest.mark.parametrize("objectives", ["", "ttft:1000"])
def test_the_rate_a_queue_bears_is_its_capacity(objectives: str) -> None:
    """Found from far below, with objectives and without; what is refused did not keep them, or piles up."""
    loads = Loads(LoadKind.RATE, (1.0,), searches=True)
    standard = Standard(Objectives.parse(objectives))
    course = _swept(loads, standard, Scenario(duration_s=200.0, prompt="8", output="8"))
    assert course.highest is not None
    assert course.highest.load.value == pytest.approx(CAPACITY, rel=0.1)
    too_much = [point for point in course.points if not point.is_kept]
    assert too_much
    for point in too_much:
        piles_up, misses = (
            point.summary["piled_up_share"] > 0.05,
            (point.summary["goodput_share"] or 1.0) < 0.9,
        )
        assert piles_up or misses


@pytest.mark.parametrize("objectives", ["", "ttft:1000"])
def test_a_load_that_is_not_sent_is_not_borne(objectives: str) -> None:
    """Senders that reach half of what a queue bears end the search there, with what to do; nothing beyond
    what was sent is called borne.
    """
    standard, told = Standard(Objectives.parse(objectives)), list[Point]()
    loads = Loads(LoadKind.RATE, (1.0,), searches=True)
    sweep = Sweep(
        Scenario(duration_s=200.0, prompt="8", output="8"), loads, standard, told.append, lambda: True
    )
    course = sweep.run(queue(PLACES, STAY_S, standard.objectives, {}, sent_per_s=CAPACITY / 2))
    *_, last = course.points
    assert course.highest is not None
    assert course.highest.load.value <= CAPACITY / 2 < last.load.value
    assert "of it was sent" in last.fault
    assert "--senders" in course.problem
    assert not last.is_kept
    assert last.worth == 0


def test_few_late_requests_are_no_limit_of_the_senders() -> None:
    """A lag that is nothing beside the run, though the gaps of three requests hardly are more."""
    summary = _swept(Loads(LoadKind.RATE, (4.0,)), Standard(), Scenario(duration_s=10.0)).points[0].summary
    late = {**summary, "achieved_over_asked": 0.9}
    assert Standard().is_sent({**late, "p99_send_lag_ms": 20.0})
    assert not Standard().is_sent({**late, "p99_send_lag_ms": 2000.0})


def test_lines_say_what_was_not_kept_and_runs_that_were_too_short() -> None:
    """Each criterion in words; a run that lasts fewer than four stays of its requests is doubted."""
    loads = Loads(LoadKind.RATE, (1.0, 64.0))
    kept, piled_up = _swept(loads, Standard(), Scenario(duration_s=60.0)).points
    assert (kept.fault, kept.warning) == ("", "")
    assert re.fullmatch(r"[\d.]+% of the requests piled up", piled_up.fault)
    missed = _swept(loads, Standard(Objectives.parse("ttft:1")), Scenario(duration_s=60.0)).points[0]
    assert missed.fault == "only 0.0% keep the objectives"
    users = Loads(LoadKind.CONCURRENCY, (float(PLACES),), searches=True)
    more = _swept(users, Standard(), Scenario(requests=400)).points[1]
    assert re.fullmatch(r"[\d,]+ tokens/s, [\d,]+ with fewer users", more.fault)
    failed = Standard().fault(kept.load, {**kept.summary, "failed": kept.summary["num_prompts"]}, None)
    assert failed == "100.0% of the requests failed"
    (short,) = _swept(Loads(LoadKind.RATE, (4.0,)), Standard(), Scenario(duration_s=1.0)).points
    assert "fewer than 4 times the p95 end to end of 0.5 s" in short.warning


def test_more_users_than_places_gain_nothing() -> None:
    """A closed loop without objectives ends where more users bring no more; with them, where they fail."""
    loads = Loads(LoadKind.CONCURRENCY, (1.0,), searches=True)
    course = _swept(loads, Standard(), Scenario(prompt="8", output="8", requests=400))
    assert course.highest is not None
    assert course.highest.load.value == pytest.approx(PLACES, abs=1)
    assert course.worth == pytest.approx(CAPACITY * OUTPUT_TOKENS, rel=0.15)
    patient = Standard(Objectives.parse("e2el:1010"))  # one round of others before, and one's own
    course = _swept(loads, patient, Scenario(prompt="8", output="8", requests=400))
    assert course.highest is not None
    assert course.highest.load.value == pytest.approx(2 * PLACES, abs=1)


def test_the_simulators_saturation() -> None:
    """The highest rate borne is what is served where twice as much is asked, but for what may pile up."""
    settings = {"dense.max_batch": 16}
    scenario = Scenario(duration_s=120.0, prompt="256", output="64")
    _, (full,) = simulate(cluster(settings=settings), replace(scenario, rate=20.0))

    def built(where: Shape, wanted: Mapping[str, Any]) -> SimulatedCluster:
        return cluster(where, dict(wanted))

    subject = simulated(shape(), settings, built, Objectives(), 600.0, lambda _: True)
    loads = Loads(LoadKind.RATE, (1.0,), searches=True)
    course = Sweep(scenario, loads, Standard(), lambda _: None, lambda: True).run(subject)
    assert course.highest is not None
    assert course.highest.load.value == pytest.approx(full["request_throughput"], rel=0.12)


def test_clusters_that_cannot_be_are_told_and_others_go_on(tmp_path: Path) -> None:
    """Every combination of shapes; a point has all figures of a run; the page has a row for each and the
    frontier.
    """
    done = CliRunner().invoke(
        app,
        ["sweep", "simulate", "--dense", "h100,h100x2", "--attention", "none,h20x4", "--rates", "1,2",
         "--duration", "5", "--slo", "tpot:60", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    points = [json.loads(line) for line in (tmp_path / "out" / POINTS).read_text().splitlines()]
    assert [(point["cluster"], point["load"]) for point in points] == [
        (shape, load) for shape in ("h100x2 alone", "h100x2 + h20x4") for load in ("rate 1", "rate 2")
    ]
    assert all(FIGURES.keys() - {"worth"} <= point.keys() and point["usd_per_mtok"] > 0 for point in points)
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("the weights are 137.5 GB") == 2
    assert "What a dollar brings" in page


@pytest.mark.parametrize(("own", "is_said"), [([], True), (["--arrivals", "gamma", "--cv", "1.5"], False)])
def test_a_sweep_says_what_it_changed_and_who_says_prices(
    own: list[str], is_said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a rate makes a workload's arrivals Poisson, unless others are asked for; and the source of a
    price.
    """
    monkeypatch.delenv("ANABRANCH_TRACES", raising=False)  # the fit, not the trace itself
    done = CliRunner().invoke(
        app,
        ["sweep", "simulate", "--dense", "h100x4", "--rates", "1,2", "--duration", "20", *own,
         "--workload", "azure-code", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.count("note: arrivals are Poisson at 1 per second, not of cv 13.2") == is_said
    assert "price of a h100: $11.06 an hour on 2024-05-01 (Lamina" in done.output
    point = json.loads((tmp_path / "out" / POINTS).read_text().splitlines()[0])
    assert point["scenario"]["arrivals"] == ("gamma" if own else None)


def test_a_sweep_of_nothing_that_can_be_is_refused(tmp_path: Path) -> None:
    """With the reason, and no page."""
    done = CliRunner().invoke(
        app, ["sweep", "simulate", "--dense", "h100", "--rates", "1", "--out", str(tmp_path / "out")]
    )
    assert isinstance(done.exception, InvalidRequest)
    assert "give a dense worker more devices" in done.exception.message
    assert not (tmp_path / "out" / PAGE).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--dense", ","], "no cluster is named"),
        (["up", "--attention", "few"], "--attention 'few'"),
        (["up", "--kinds", "h100"], "write dense=h100,attention=h20"),
        (["up", "--rates", "1", "--concurrency", "1"], "give one of --rates"),
        (["simulate", "--search", "3"], "--search needs a space"),
        (["simulate", "--vary", "dense.max_batch=1..9"], "only --search"),
        (["simulate", "--attention", "h20", "--rates", "1", "--maximise", "luck"], "luck"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    """In one sentence, before anything is started."""
    done = CliRunner().invoke(app, ["sweep", *arguments, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, InvalidRequest)
    assert words in done.exception.message


def test_a_search_finds_better_settings_than_those_configured(tmp_path: Path) -> None:
    """Among few trials of a fixed seed, which repeat; the landscape is in the page."""

    def worths(folder: str) -> list[float]:
        done = CliRunner().invoke(
            app,
            ["sweep", "simulate", "--attention", "h20x4", "--set", "dense.max_batch=4",
             "--search", "6", "--vary", "dense.max_batch=4..256", "--vary", "dense.step_tokens=512,2048",
             "--concurrency", "64", "--prompt", "64", "--output", "16", "--requests", "128", "--seed", "3",
             "--out", str(tmp_path / folder)],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "over the settings as configured" in done.output
        return [json.loads(line)["worth"] for line in (tmp_path / folder / POINTS).read_text().splitlines()]

    found = worths("first")
    assert max(found[1:]) > 1.5 * found[0]
    assert worths("again") == found
    page = (tmp_path / "first" / PAGE).read_text()
    for words in ("Course of the search", "dense.max_batch and dense.step_tokens", 'class="tile"'):
        assert words in page


def test_a_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where Optuna is missing."""
    monkeypatch.delitem(sys.modules, "loadgen.sweep.search", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = CliRunner().invoke(
        app,
        ["sweep", "simulate", "--attention", "h20x4", "--search", "2", "--vary", "dense.max_batch=4..8",
         "--rates", "1", "--out", str(tmp_path / "out")],
    )  # fmt: skip
    assert isinstance(done.exception, ConfigError)
    assert "pip install 'anabranch[search]'" in done.exception.message


def test_spaces() -> None:
    """Values are YAML, ranges are whole or not, wide ones are drawn from by their logarithm."""
    assert parse("a.b=1,true,x") == Choice("a.b", (1, True, "x"))
    assert parse("a=16..1024") == Span("a", 16, 1024, is_whole=True)
    assert (parse("a=0.5..0.9"), Span("a", 0.5, 0.9, is_whole=False).is_log) == (
        Span("a", 0.5, 0.9, is_whole=False),
        False,
    )
    assert Span("a", 16, 1024, is_whole=True).is_log
    assert list(grid([Choice("a", (1, 2)), Choice("b", (3,))])) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse("a"), "KEY=A,B,C"),
        (lambda: parse("a=9..1"), "from the lower to the higher"),
        (lambda: list(grid([Span("a", 1, 2, is_whole=True)])), "only --search"),
        (lambda: Loads(LoadKind.RATE, (0.0,)), "above 0"),
        (lambda: Standard(attained=0.0), "above 0"),
    ],
)
def test_wrong_wishes_are_refused(call: Callable[[], object], words: str) -> None:
    """In one sentence."""
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        call()


def test_the_frontier_is_the_best_at_no_more_than_each_latency() -> None:
    """It never falls, and lies on or above every point; nothing in the page asks for anything."""
    standard = Standard(Objectives.parse("ttft:400"))
    content = sweep_page(swept_queues(standard), standard, is_search=False)
    (plot,) = next(section.plots for section in content.sections if section.title == "Cost frontier")
    frontier, *clusters = plot.lines
    assert list(frontier.ys) == sorted(frontier.ys)
    for line in clusters:
        for x, y in zip(line.xs, line.ys, strict=True):
            assert y <= max(top for at, top in zip(frontier.xs, frontier.ys, strict=True) if at <= x)
    page = render(content)
    assert "&lt;b&gt;queue" in page
    assert not re.search(r"<script|src=|href=|url\(|@import|https?:", page)


def test_tiles_are_darker_where_more_is() -> None:
    """Well formed, with the value in each, and blank where nothing was tried."""
    values = {(0, 0): 1.0, (1, 0): 4.0, (1, 1): 0.0}
    svg = ElementTree.fromstring(draw_tiles(Tiles("a & b", "", "x", "y", ("1", "2"), ("3", "4"), values)))
    opacities = [float(tile.attrib["fill-opacity"]) for tile in svg.iter("rect")]
    assert len(opacities) == 3
    assert opacities[2] < opacities[0] < opacities[1]


def test_a_running_server_is_swept(tmp_path: Path) -> None:
    """Two at a time, 0.1 s each: 5 requests per second are borne, 60 are not; each point is also a run."""
    with OpenAiServer(Script(first_s=0.1, gap_s=0.0, places=2)) as server:
        done = CliRunner().invoke(
            app,
            ["sweep", "run", "--openai", server.target.url, "--rates", "5,60", "--duration", "1",
             "--prompt", "8", "--output", "2", "--slo", "ttft:400", "--shape", "dense=1xh100",
             "--out", str(tmp_path / "out")],
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    few, many = (json.loads(line) for line in (tmp_path / "out" / POINTS).read_text().splitlines())
    assert (few["is_kept"], many["is_kept"]) == (True, False)
    assert f"not borne ({many['fault']})" in done.output
    assert few["model_id"] == MODEL
    for number, point in enumerate((few, many), 1):
        (summary,) = read_summaries(tmp_path / "out" / f"run-{number:03d}")
        assert {**point, "stage": "run"} == {**point, **summary}
    assert few["good_tokens_per_usd"] > 0
    assert (tmp_path / "out" / PAGE).is_file()
