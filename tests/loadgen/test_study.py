"""Studies: what a file may ask, figures over seeds, gains and agreement by hand, the example, the page."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from statistics import fmean

import pytest
from rich.console import Console

from anabranch.cli.loadgen.recording import Recorder
from anabranch.cli.loadgen.study.ways import Ways
from cluster import hardware
from cluster.errors import InvalidRequest
from loadgen.pool import StopSwitch
from loadgen.report.page import render
from loadgen.report.study_page import gain, interval, part_table, study_page
from loadgen.results import PAGE, read_run
from loadgen.study.figures import Estimate, Runs, StudyResults
from loadgen.study.study import Study, Way, read
from tests.loadgen.studied import SIMULATED_ONLY, SOME, told, two_cases
from tests.tidy.source import ROOT

EXAMPLE = Path(str(files("loadgen.study") / "example.toml"))
PROGRAM = "from anabranch.cli.entry import loadgen; loadgen()"


def _read(folder: Path, text: str) -> Study:
    (folder / "study.toml").write_text(text)
    return read(folder / "study.toml")


def test_the_example_can_be_read_and_built() -> None:
    """Its devices and models are known, and all ways are in it."""
    example = read(EXAMPLE)
    assert {way for part in example.part for way in part.ways} == set(Way)
    example.require_known(hardware.built_in())


def test_the_simulator_keeps_to_the_last_emulations(tmp_path: Path) -> None:
    """Of every emulated case of the example it says the tokens per second within a tenth, as it is now."""
    example = read(EXAMPLE)
    runs = json.loads((ROOT / "bench" / "study.json").read_text("utf-8"))["runs"]
    emulated = {(run["part"], run["case"]): run["figures"] for run in runs if run["way"] == Way.EMULATED}
    with closing(StopSwitch()) as stop, Console().status("") as status:
        ways = Ways(Recorder(Console(), status, stop), lambda _: True)
    for part in example.part:
        for case in part.case if Way.EMULATED in part.ways else ():
            with ways.opened(part, case, Way.SIMULATED) as opened:
                loads = [part.load.scenario(seed, tmp_path / "rows.csv") for seed in example.seeds]
                folders = [tmp_path / f"{part.title}-{case.name}-{seed}" for seed in example.seeds]
                summaries = list(map(opened.measure, loads, folders))
            rates = [summary["output_throughput"] for summary in summaries]
            measured = emulated.pop((part.title, case.name))["output_throughput"]
            assert fmean(rates) == pytest.approx(fmean(measured), rel=0.1), (part.title, case.name)
    assert not emulated


def test_the_example_staggers_where_it_asks_what_that_is_worth(tmp_path: Path) -> None:
    """Under its full batch most steps do; without, tokens come a twentieth slower at least."""
    (part,) = (part for part in read(EXAMPLE).part if part.title == "A full batch")
    with closing(StopSwitch()) as stop, Console().status("") as status:
        ways = Ways(Recorder(Console(), status, stop), lambda _: True)
    found = {}
    for case in part.case:
        with ways.opened(part, case, Way.SIMULATED) as opened:
            found[case.name] = opened.measure(
                part.load.scenario(1, tmp_path / "rows.csv"), tmp_path / case.name
            )
    both, single = found["h100x2 + h20x4"], found["without staggering"]
    assert both["staggered_share"] > 0.5 > single["staggered_share"] == 0
    assert both["output_throughput"] > 1.05 * single["output_throughput"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("seeds = []", r"seeds.*part"),
        (SIMULATED_ONLY.replace("concurrency", "users"), r"part\.0\.load\.users"),
        (SIMULATED_ONLY.replace('"simulated"', '"dreamt"'), r"part\.0\.ways\.0"),
        ("[[part", "is no study"),
        (SIMULATED_ONLY + SIMULATED_ONLY.partition("]\n")[2], "two parts have one title"),
        (SIMULATED_ONLY.replace('"two"', '"one"'), "two cases of A part have one name"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, wrong: str, words: str) -> None:
    """In words that name it."""
    with pytest.raises(InvalidRequest, match=words):
        _read(tmp_path, wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (('"h100"', '"h101"'), "'h101'"),
        (('"llama3-8b"', '"llama3-8bb"'), "no model 'llama3-8bb'"),
        (('["simulated"]', '["real"]'), "real clusters take .* neither overlap"),
        (('["simulated"]', '["emulated"]'), "emulated clusters take their own step_s"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    tmp_path: Path, wrong: tuple[str, str], words: str
) -> None:
    """Devices and models that nobody knows, and what a way cannot obey."""
    text = SIMULATED_ONLY.replace("overlap = false", 'overlap = false\nefficiency = "step_s=0.01"')
    with pytest.raises(InvalidRequest, match=words):
        _read(tmp_path, text.replace(*wrong)).require_known(hardware.built_in())


def test_one_case_that_fails_does_not_cost_the_others_theirs(tmp_path: Path) -> None:
    """Weights that do not fit one device: told at the end, with status 1, and the other case is there."""
    small = SIMULATED_ONLY.replace("llama3-8b", "llama-33b").replace('"h100"', '"l40s"', 1)
    (tmp_path / "asked.toml").write_text(small)
    command = [sys.executable, "-c", PROGRAM, "study", "asked.toml", "--out", "found"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "A part: one, simulated: l40sx1 holds" in done.stderr
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [run["case"] for run in found["runs"]] == ["two"]


def test_a_load_is_a_scenario_of_its_seed(tmp_path: Path) -> None:
    """Rows come in the order of the file."""
    study = _read(tmp_path, SIMULATED_ONLY)
    scenario = study.part[0].load.scenario(7, tmp_path / "rows.csv")
    assert (scenario.seed, scenario.concurrency, scenario.requests) == (7, (2,), 6)
    assert scenario.trace_file is not None
    assert scenario.trace_file.read_text() == "64,16\n32,8\n"


def test_an_interval_is_student_s() -> None:
    """1, 2, 3: mean 2, deviation 1, t = 4.303 at two degrees of freedom; one seed has none."""
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate.mean == 2.0
    assert estimate.half_width == pytest.approx(4.303 / 3**0.5)
    assert Estimate.of([5.0]) == Estimate(5.0, None)
    assert (interval(estimate), interval(None)) == ("2.00 ± 2.48", "–")
    assert gain(Estimate(0.25, 0.05)) == "+25.0% ± 5.0%"


def test_gains_are_taken_seed_by_seed(tmp_path: Path) -> None:
    """110 over 100 and 240 over 200 are 10 and 20 %; the first case has no gain."""
    results = two_cases(_read(tmp_path, SIMULATED_ONLY), ([100.0, 200.0], [110.0, 240.0]))
    first, second = results.runs
    assert results.gain(first) is None
    found = results.gain(second)
    assert found is not None
    assert found.mean == pytest.approx(0.15)


def test_a_case_that_brought_nothing_has_no_gain(tmp_path: Path) -> None:
    """Nor has one beside it; failed requests make runs doubtful."""
    results = two_cases(_read(tmp_path, SIMULATED_ONLY), ([0.0, 0.0], [110.0, 240.0]))
    assert results.gain(results.runs[1]) is None
    failed = Runs(
        "A part", "one", Way.SIMULATED, ({"failed": 1, "num_prompts": 6}, {"failed": 2, "num_prompts": 6})
    )
    assert failed.doubts == ("3 of 12 requests failed",)


def test_parts_with_cases_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """In the table of agreement each keeps its own row."""
    once = SIMULATED_ONLY.partition("[[part]]")[2]
    study = _read(tmp_path, SIMULATED_ONLY + "[[part]]" + once.replace('"A part"', '"Another"'))
    runs = tuple(
        Runs(title, "one", way, ({**SOME, "output_throughput": value},))
        for title, values in (("A part", (100.0, 101.0)), ("Another", (100.0, 130.0)))
        for way, value in zip((Way.EMULATED, Way.SIMULATED), values, strict=True)
    )
    content = study_page(StudyResults(study, runs), told())
    (table,) = content.sections[-1].tables
    assert [(row[0], row[3]) for row in table.rows] == [("A part", "+1.0%"), ("Another", "+30.0%")]


def test_ways_agree_where_the_simulated_figure_is_near(tmp_path: Path) -> None:
    """By at most a tenth: 112 beside 100 is beyond, 108 is not; of real runs too, by name on the page."""
    study = _read(tmp_path, SIMULATED_ONLY)
    title, case = study.part[0].title, study.part[0].case[0].name
    for predicted, way, beyond in ((112.0, Way.EMULATED, 1), (108.0, Way.EMULATED, 0), (200.0, Way.REAL, 1)):
        runs = (
            Runs(title, case, way, ({**SOME, "output_throughput": 100.0},)),
            Runs(title, case, Way.SIMULATED, ({**SOME, "output_throughput": predicted},)),
        )
        results = StudyResults(study, runs)
        offs = {key: off for _, key, off in results.agreements()}
        assert offs["output_throughput"] == pytest.approx(predicted / 100 - 1)
        assert len(results.beyond) == beyond
        words = study_page(results, told()).sections[-1].words
        assert (f"Further off: output tokens/s of A part: one, {way} +" in words) == bool(beyond)


def test_the_page_shows_every_case_and_what_makes_it_doubtful(tmp_path: Path) -> None:
    """A row for each case and way; notes are warnings."""
    results = two_cases(_read(tmp_path, SIMULATED_ONLY), ([100.0, 200.0], [110.0, 240.0]))
    content = study_page(results, told())
    (part,) = results.study.part
    assert [row[0] for row in part_table(part, results).rows] == ["one", "two"]
    assert content.warnings == ("A part: two, simulated: it was slow",)
    page = render(content)
    assert "0123abc" in page
    assert "+15.0%" in page


def test_a_study_leaves_runs_figures_page_and_archive(tmp_path: Path) -> None:
    """By the command: a folder for each seed of each case, all in one archive; again under a new name."""
    (tmp_path / "asked.toml").write_text(SIMULATED_ONLY)
    command = [sys.executable, "-c", PROGRAM, "study", "asked.toml", "--out", "found"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found" / "results.json").read_text())
    assert [(run["case"], run["way"]) for run in found["runs"]] == [
        ("one", "simulated"),
        ("two", "simulated"),
    ]
    assert all(len(run["figures"]["output_throughput"]) == 2 for run in found["runs"])
    runs = sorted(path.name for path in (tmp_path / "found").iterdir() if path.is_dir())
    assert runs == [
        f"{n:02d}-a-part-{name}-simulated-{seed}" for n, name in ((1, "one"), (2, "two")) for seed in (1, 2)
    ]
    assert len(read_run(tmp_path / "found" / runs[0]).records) == 6
    with tarfile.open(tmp_path / "found.tar.gz") as archive:
        assert {f"found/{name}" for name in ("results.json", PAGE, "study.toml")} <= set(archive.getnames())
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 2
    assert "cannot be a new folder" in again.stderr
