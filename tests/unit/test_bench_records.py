"""Benches' records: every number follows from what stands beside it, and a changed one is found by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from anabranch.cli.bench import results_file
from anabranch.cli.bench.records import (
    Results,
    differences,
    extreme,
    figure,
    fits,
    is_within_bound,
    misses,
    prediction,
    ratio,
    records,
)
from anabranch.cli.bench.table import quantity, results_table
from cluster.errors import ConfigError

FLOOR = {"read_bytes": 4.0, "bandwidth_bytes_per_s": 2.0}


def results() -> Results:
    """One record of each kind, as a file holds them."""
    ours, theirs = ("ours", [2.0, 3.0, 40.0]), ("theirs", [1.0, 2.0, 2.5])
    worst = {"one": ratio(ours, theirs, "s"), "two": ratio(theirs, ours, "s")}
    return results_file.stamp(
        {
            "lane": {
                "trip": figure(
                    [3.0, 1.0, 2.0],
                    "s",
                    floor=prediction("lane_floor_s", {"layers": 2, "round_trip_s": 0.25}),
                ),
                "local_vs_bare": ratio(ours, theirs, "s", at_most=1.3),
                "read_ratio_min": extreme("least", worst, at_least=0.5),
            },
            "step": {
                "hidden_share": ratio(theirs, ours, "s", complement=True),
                "predicted": prediction(
                    "single_step_s",
                    {"dense_s": 1.0, "attention_s": 2.5, "lane_s": 0.5},
                ),
            },
            "context": {"line": fits({1.0: [3.0], 2.0: [5.5], 4.0: [9.0]}, "s")},
            "serve": [{"batch": 1, "vs_vllm_cpu": ratio(ours, theirs, "s")}],
        }
    )


def test_values_follow_from_samples() -> None:
    """Medians, their ratio, its complement, the least of several, and an equation of the model."""
    lane, step = results()["lane"], results()["step"]
    assert lane["trip"]["value"] == 2.0
    assert lane["local_vs_bare"]["value"] == 1.5
    assert lane["read_ratio_min"]["value"] == pytest.approx(2 / 3)
    assert step["hidden_share"]["value"] == pytest.approx(1 / 3)
    assert step["predicted"]["value"] == 4.0


def test_bounds_are_kept_or_not() -> None:
    """A record says whether what is asked of it holds."""
    lane = results()["lane"]
    assert is_within_bound(lane["local_vs_bare"]) is False
    assert is_within_bound(lane["read_ratio_min"]) is True
    assert is_within_bound(lane["trip"]) is None


def test_misses_are_listed_once() -> None:
    """The worst of several names the miss, not its parts; what is kept or free is not listed."""
    part = ratio(("a", [1.0]), ("b", [2.0]), "s", at_least=0.9)
    told = {
        "worst": extreme("least", {"one": part}, at_least=0.9),
        "kept": ratio(("a", [1.0]), ("b", [2.0]), "s", at_most=0.9),
        "free": ratio(("a", [1.0]), ("b", [2.0]), "s"),
    }
    assert misses(told) == ["worst: 0.5, asked: at least 0.9"]


def test_what_was_measured_verifies() -> None:
    """Through JSON and back nothing differs."""
    assert differences(json.loads(json.dumps(results()))) == []


NAMES = [name for name, _ in records(results())]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_value_is_found_by_name(name: str) -> None:
    """Whichever value is changed, its name is told."""
    changed = copy.deepcopy(results())
    for found, record in records(changed):
        if found == name:
            _place(changed, name)["value"] = record["value"] * 1.001
    assert [line.partition(":")[0] for line in differences(changed)] == [name]


def test_a_line_is_told_in_full() -> None:
    """Points of a line give its slope and intercept, all variance explained and no deviation; one point off
    it is the largest deviation.
    """
    exact = fits({1.0: [5.0], 10.0: [23.0], 100.0: [203.0]}, "s")
    assert {part: record["value"] for part, record in exact.items()} == pytest.approx(
        {"slope": 2.0, "intercept": 3.0, "r2": 1.0, "deviation_max": 0.0}, abs=1e-9
    )
    bent = fits({1.0: [5.0], 10.0: [23.0], 100.0: [303.0]}, "s")
    assert bent["deviation_max"]["value"] > 0.05
    assert bent["r2"]["value"] < 1.0


def test_a_floor_stands_in_the_row_of_its_figure() -> None:
    """The table has a row for each record that is no floor, and the floor's value beside its figure."""
    table = results_table({"trip": figure([3.0], "s", floor=prediction("read_floor_s", FLOOR))})
    assert table.row_count == 1
    (row,) = zip(*(column.cells for column in table.columns), strict=True)
    assert [str(cell) for cell in row[:3]] == ["trip", "3 s", "2 s"]


def _place(changed: Results, name: str) -> Results:
    """The record of a dotted name, to be changed in place."""
    place = changed
    for part in name.replace("[", ".").replace("]", "").split("."):
        place = place["of"] if "of" in place and part in place["of"] else place
        place = place[int(part)] if isinstance(place, list) else place[part]
    return place


def test_a_ratio_without_provenance_is_found() -> None:
    """A ratio that tells no commit or command does not verify."""
    bare = {"x": ratio(("a", [1.0]), ("b", [2.0]), "s")}
    assert differences(bare) == ["x: tells no commit or command"]


def test_a_file_keeps_other_benches(tmp_path: Path) -> None:
    """Writing one bench's results leaves another's; machine and date stand beside them."""
    path = tmp_path / "deep" / "results.json"
    both = results()
    results_file.write(path, {"lane": both["lane"]})
    results_file.write(path, {"step": both["step"]})
    found = results_file.read(path)
    assert {"lane", "step", "machine", "date"} == set(found)
    assert differences(found) == []


def test_results_of_another_machine_are_not_mixed(tmp_path: Path) -> None:
    """Figures of two machines do not belong in one file."""
    path = tmp_path / "results.json"
    results_file.write(path, results())
    path.write_text(path.read_text().replace('"cores": ', '"cores": 9'))
    with pytest.raises(ConfigError, match="another machine"):
        results_file.write(path, results())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"a": 1}'])
def test_a_file_without_results_is_refused(text: str, tmp_path: Path) -> None:
    """What no bench wrote cannot pass as verified."""
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        results_file.read(path)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.00123, "s", "1.23 ms"), (31e-6, "s", "31 us"), (13.7e9, "B/s", "13.7 GB/s"), (1.2345, "", "1.234")],
)
def test_quantities_read_well(value: float, unit: str, text: str) -> None:
    """Units are chosen to keep numbers short."""
    assert quantity(value, unit) == text
