"""A real Prometheus over the pods of a rendered release, set up from its objects as the operator would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helm.charts import CHART, NAMESPACE, RELEASE, Manifest, selects
from tests.helm.pods import Pod

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
MISSING = "no Prometheus: .ci/install-system installs Debian's"

_ADDRESS = "127.0.0.1:9090"
_PATIENCE_S = 30.0
_LOOK_S = 0.2


def rules_of(objects: Sequence[Manifest]) -> dict[str, Any]:
    """A file of rules, as Prometheus reads it, of the release's PrometheusRule."""
    (found,) = (each for each in objects if each["kind"] == "PrometheusRule")
    return {"groups": found["spec"]["groups"]}


def panel_queries() -> dict[str, str]:
    """The dashboard's queries for the release: panel and series -> expression."""
    found = {}
    for panel in json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$namespace", NAMESPACE).replace("$release", RELEASE)
            found[f"{panel['title']}: {target['legendFormat']}"] = query
    return found


def targets_of(objects: Sequence[Manifest], pods: Sequence[Pod]) -> list[dict[str, Any]]:
    """The endpoints that the release's PodMonitor selects, with the labels that the operator gives them."""
    (monitor,) = (each for each in objects if each["kind"] == "PodMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    return [
        {"targets": [f"{pod.host.address}:{port}"], "labels": _labels(monitor, pod)}
        for pod in pods
        if selects(selector, pod.manifest)
        for port in _ports(monitor, pod)
    ]


def _ports(monitor: Manifest, pod: Pod) -> Iterator[int]:
    names = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    return (port["containerPort"] for port in pod.container.get("ports", ()) if port["name"] in names)


def _labels(monitor: Manifest, pod: Pod) -> dict[str, str]:
    given = pod.manifest["metadata"]["labels"]
    kept = {re.sub(r"\W", "_", name): given[name] for name in monitor["spec"]["podTargetLabels"]}
    return {"namespace": NAMESPACE, "pod": pod.name, **kept}


class Prometheus:
    """A server that scrapes the pods every second and evaluates the release's rules. To be started in the
    pods' network, and ended with `kill`.
    """

    def __init__(self, folder: Path, objects: Sequence[Manifest], pods: Sequence[Pod]) -> None:
        assert PROMETHEUS is not None, MISSING
        self._pods = len(targets_of(objects, pods))
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules_of(objects)))
        scrape = {"job_name": "pods", "static_configs": targets_of(objects, pods)}
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [scrape],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        self._log = folder / "prometheus.log"
        words = ["--config.file", str(folder / "prometheus.yaml"), "--web.listen-address", _ADDRESS]
        words += ["--storage.tsdb.path", str(folder / "series")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([PROMETHEUS, *words], stdout=log, stderr=log)

    def await_targets(self) -> None:
        """Wait until every pod was scraped twice, so that what counts from now on is seen to grow."""
        self.await_query(f"sum(count_over_time(up[1m]) > bool 1) == {self._pods} and sum(up) == {self._pods}")

    def await_query(self, query: str) -> list[tuple[Mapping[str, str], float]]:
        """Wait until a query has data, none of it NaN; its series: (labels, value)."""
        end_s = time.monotonic() + _PATIENCE_S
        while True:
            found = self._query(query)
            if found and all(value == value for _, value in found):
                return found
            assert time.monotonic() < end_s, f"no data for {query}: {found}\n{self._log.read_text()[-2000:]}"
            threading.Event().wait(_LOOK_S)

    def rules(self) -> dict[str, str]:
        """The health of each rule: ok after an evaluation, or what is wrong."""
        groups = self._ask("rules", {})["groups"]
        return {rule["name"]: rule.get("lastError") or rule["health"] for g in groups for rule in g["rules"]}

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(10)

    def _query(self, query: str) -> list[tuple[Mapping[str, str], float]]:
        try:
            result = self._ask("query", {"query": query})["result"]
        except OSError:  # not yet listening
            return []
        return [(each["metric"], float(each["value"][1])) for each in result]

    def _ask(self, what: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        assert self._process.poll() is None, self._log.read_text()[-2000:]
        url = f"http://{_ADDRESS}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer)["data"])
