"""Pages in a real browser: nothing is asked for, nothing fails, and what is seen are the records' figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadgen.metrics import Objectives, Summary
from loadgen.report.comparison_page import comparison_page, pairs_of
from loadgen.report.content import Content, text
from loadgen.report.page import render
from loadgen.report.run_page import run_page
from loadgen.report.study_page import part_table, study_page
from loadgen.report.sweep_page import ranked, sweep_page
from loadgen.study.study import Study
from loadgen.sweep.load import Standard
from tests.loadgen.drawn_runs import drawn_run
from tests.loadgen.queueing import swept_queues
from tests.loadgen.studied import SIMULATED_ONLY, told, two_cases

pytestmark = pytest.mark.system


@dataclass(frozen=True)
class _Seen:
    dom: str
    """After it was loaded."""
    said: str
    """The browser's console and errors."""
    asked: tuple[str, ...]
    """Addresses that were asked for, other than the page's."""


def _open(page: str, folder: Path) -> _Seen:
    browser = shutil.which("chromium")
    assert browser, "install chromium: .ci/install-system does"
    (folder / "page.html").write_text(page)
    address = (folder / "page.html").as_uri()
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"),
            *(f"--log-net-log={folder / 'net.json'}", "--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    asked = _asked(json.loads((folder / "net.json").read_text()))
    return _Seen(done.stdout, done.stderr, tuple(one for one in asked if one != address))


def _asked(log: dict[str, Any]) -> list[str]:
    """Addresses of all requests that the page began, whatever became of them: what the browser asks for
    itself has no initiator.
    """
    told = [event["params"] for event in log["events"] if "url" in event.get("params", {})]
    nobody = "not an origin"
    return [params["url"] for params in told if params.get("initiator", nobody) != nobody]


class _Figures(HTMLParser):
    """Texts of the elements that name a figure, all texts, and how many pictures there are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.texts: set[str] = set()
        self.pictures = 0
        self._key = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._key = dict(attributes).get("data-figure") or dict(attributes).get("data-key") or ""
        self.pictures += tag == "svg"

    def handle_data(self, data: str) -> None:
        self.texts.add(data)
        if self._key:
            self.found.setdefault(self._key, data)
            self._key = ""


def _assert_clean(seen: _Seen) -> None:
    assert seen.asked == ()
    assert not re.search(r"CONSOLE|Uncaught|Refused to|violates", seen.said), seen.said


@dataclass(frozen=True)
class _Shown:
    """A page, and what is to be seen on it."""

    content: Content
    summary: Summary
    """Of the first cards."""
    texts: tuple[str, ...]
    pictures: int


def _a_run() -> _Shown:
    run = drawn_run()
    (summary,) = run.summaries
    return _Shown(run_page(run), summary, (f"${text(summary['usd_per_mtok'])}",), 10)


def _a_comparison() -> _Shown:
    runs = [drawn_run("base"), drawn_run("slow", slowness=1.5, seed=2)]
    pairs = pairs_of(runs)
    verdicts = tuple(difference.verdict for difference in pairs[0].differences)
    return _Shown(comparison_page(runs, pairs), runs[0].summaries[0], verdicts, 7)


def _a_sweep() -> _Shown:
    standard = Standard(Objectives.parse("ttft:400"))
    courses = swept_queues(standard)
    best = ranked(courses)[0].best
    assert best is not None
    cells = tuple(
        words
        for course in courses
        for point in course.points
        for words in (point.subject, str(point.load), text(point.summary["p99_ttft_ms"]))
    )
    return _Shown(sweep_page(courses, standard, is_search=True), best.summary, cells, 9)


def _a_study() -> _Shown:
    study = Study.model_validate(tomllib.loads(SIMULATED_ONLY))
    results = two_cases(study, ([100.0, 200.0], [110.0, 240.0]))
    cells = tuple(words for row in part_table(study.part[0], results).rows for words in row)
    return _Shown(study_page(results, told()), results.runs[0].summaries[0], cells, 1)


@pytest.mark.parametrize("shows", [_a_run, _a_comparison, _a_sweep, _a_study])
def test_a_page(shows: Callable[[], _Shown], tmp_path: Path) -> None:
    """Every figure is there as the records give it, what only such a page has too, and all its pictures."""
    shown = shows()
    seen = _open(render(shown.content), tmp_path)
    _assert_clean(seen)
    figures = _Figures()
    figures.feed(seen.dom)
    for key in (
        "completed",
        "failed",
        "output_throughput",
        "median_ttft_ms",
        "p99_itl_ms",
        "request_goodput",
    ):
        assert figures.found[key] == text(shown.summary[key]), key
    assert figures.texts.issuperset(shown.texts)
    assert figures.pictures == shown.pictures


def test_these_checks_see_what_they_look_for(tmp_path: Path) -> None:
    """A page that asks for a picture elsewhere, and one whose script fails, are found out."""
    page = render(run_page(drawn_run(requests=20)))
    unguarded = re.sub(r"<meta http-equiv.*?>", "", page)
    asking = unguarded.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>')
    (tmp_path / "asking").mkdir()
    assert _open(asking, tmp_path / "asking").asked == ("http://127.0.0.1:9/x.png",)
    (tmp_path / "failing").mkdir()
    failing = _open(unguarded.replace("</main>", "<script>nothing()</script></main>"), tmp_path / "failing")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        _assert_clean(replace(failing, asked=()))
