"""The alerts, by Prometheus's own tools: they parse, and fire when they should and only then."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.charts import EXAMPLES, manifests
from tests.helm.scraping import MISSING, PROMTOOL, rules_of

pytestmark = pytest.mark.system

CASES = Path(__file__).with_name("alert_tests.yaml")


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """The rules of an example with a registry, which has all of them, in a file that Prometheus reads."""
    objects = manifests((EXAMPLES / "external-redis" / "rendered.yaml").read_text())
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules_of(objects)))
    return file


def _promtool(folder: Path, *words: str) -> str:
    assert PROMTOOL is not None, MISSING
    outcome = subprocess.run([PROMTOOL, *words], cwd=folder, capture_output=True, text=True, check=False)
    said = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, said
    return said


def test_the_rules_pass_promtools_check(rules: Path) -> None:
    """Prometheus would load each of them."""
    alerts = _alerts(yaml.safe_load(rules.read_text()))
    assert f"{len(alerts)} rules found" in _promtool(rules.parent, "check", "rules", "rules.yaml")


def test_alerts_fire_when_they_should_and_only_then(rules: Path) -> None:
    """All cases of alert_tests.yaml hold: series over time, and what fires at which moment."""
    shutil.copy(CASES, rules.parent)
    assert "SUCCESS" in _promtool(rules.parent, "test", "rules", CASES.name)


def test_every_alert_is_seen_firing_and_silent(rules: Path) -> None:
    """None lacks a case of either kind."""
    asked = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    alerts = set(_alerts(yaml.safe_load(rules.read_text())))
    assert {case["alertname"] for case in asked if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in asked if not case["exp_alerts"]} == alerts


def _alerts(rules: dict[str, Any]) -> list[str]:
    found: Iterator[dict[str, Any]] = (rule for group in rules["groups"] for rule in group["rules"])
    return [rule["alert"] for rule in found]
