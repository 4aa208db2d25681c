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
    is_within_bound,
    prediction,
    ratio,
    records,
)
from anabranch.cli.bench.table import quantity
from cluster.errors import ConfigError


def results() -> Results:
    """One record of each kind, as a file holds them."""
    ours, theirs = ("ours", [2.0, 3.0, 40.0]), ("theirs", [1.0, 2.0, 2.5])
    worst = {"one": ratio(ours, theirs, "s"), "two": ratio(theirs, ours, "s")}
    return results_file.stamp(
        {
            "lane": {
                "trip": figure([3.0, 1.0, 2.0], "s", floor=0.5),
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
