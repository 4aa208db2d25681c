"""What Helm 3 and 4 make of the chart, and what Kubernetes would say to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.charts import (
    CHART,
    EXAMPLES,
    HELMS,
    NEWEST,
    OLDEST,
    Manifest,
    config_files,
    helm,
    manifests,
    render,
)

pytestmark = pytest.mark.system

SHAPES = sorted(path.name for path in EXAMPLES.iterdir())


def _rendered(tmp_path: Path, values: dict[str, Any], *words: str) -> list[Manifest]:
    outcome = _outcome(tmp_path, values, *words)
    assert outcome.returncode == 0, outcome.stderr
    return manifests(outcome.stdout)


def _outcome(
    tmp_path: Path, values: dict[str, Any], *words: str, version: int = 4
) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    return render(version, file, *words)


def _named(objects: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = (
        each
        for each in objects
        if (each["kind"], each["metadata"]["name"]) == (kind, f"demo-anabranch{name}")
    )
    return found


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chart_passes_lint(version: int, shape: str) -> None:
    """`helm lint --strict` finds nothing."""
    outcome = helm(version, "lint", "--strict", str(CHART), "-f", str(EXAMPLES / shape / "values.yaml"))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("version", HELMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_examples_in_the_tree_are_what_is_rendered(version: int, shape: str) -> None:
    """Both Helms make the objects of deploy/helm/examples: `make chart` renders them again."""
    outcome = render(version, EXAMPLES / shape / "values.yaml")
    assert outcome.returncode == 0, outcome.stderr
    assert manifests(outcome.stdout) == manifests((EXAMPLES / shape / "rendered.yaml").read_text())


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
def test_kubernetes_knows_every_field(kubernetes: str) -> None:
    """Strict validation in the oldest and the newest version; of operators' objects there are no schemas."""
    program = str(Path(sys.executable).with_name("kubernetes-validate"))
    files = [str(EXAMPLES / shape / "rendered.yaml") for shape in SHAPES]
    command = [program, "--strict", "-k", kubernetes, *files]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    said = (outcome.stdout + outcome.stderr).splitlines()
    unknown = {line.partition(" for kind ")[2].partition(" ")[0] for line in said if "find schema" in line}
    assert unknown == {"PodMonitor", "PrometheusRule", "RayCluster"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"attention": {"arena": "4GiB", "resources": {"limits": {"memory": "4Gi"}}}},
            "raise it, leave it out",
        ),
        ({"attention": {"replicas": 0}}, "config.dense.local_arena"),
        ({"model": {"delivery": "claim"}}, "model.claim: name"),
        ({"model": {"delivery": "image", "path": "models"}}, "from / on"),
        ({"model": {"path": "/x"}}, "a fetched model has its own folder"),
        ({"model": {"delivery": "claim", "claim": "c", "source": "a/b@c"}}, "only model.delivery: fetch"),
        ({"registry": {"url": "redis://r:6379", "builtIn": True}}, "give one of the two"),
        ({"tls": {"existingSecret": "x"}, "registry": {"builtIn": True}}, "begins with rediss://"),
        ({"tls": {"existingSecret": "x"}, "registry": {"url": "redis://r:6379"}}, "begins with rediss://"),
        ({"tls": {"mutual": True}}, "tls.existingSecret"),
        ({"autoscaler": {"enabled": True, "dense": {"least": 5}}}, "autoscaler.dense: least 5"),
        ({"attention": {"arena": "4Gi"}}, "arena"),
        ({"config": {"dense": {"thread": 1}}}, "thread"),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", HELMS)
def test_values_that_cannot_work_fail_the_render(
    version: int, values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Before anything is installed, in words that name the key."""
    outcome = _outcome(tmp_path, values, version=version)
    assert outcome.returncode != 0
    assert words in outcome.stderr


def test_memory_and_grace_follow_the_arena(tmp_path: Path) -> None:
    """An attention worker asks for its arena and the margin, and gets the time its cache takes to leave."""
    values = {"attention": {"arena": "10GiB", "memoryMargin": "1GiB"}, "drain": {"bandwidth": "100MB"}}
    spec = _named(_rendered(tmp_path, values), "StatefulSet", "-attention")["spec"]["template"]["spec"]
    resources = spec["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"] == f"{11 * 1024}Mi"
    drain_s = -(-10 * 2**30 // 10**8) + 30
    assert spec["terminationGracePeriodSeconds"] > drain_s
    config = _named(_rendered(tmp_path, values), "ConfigMap", "-config")["data"]["config.yaml"]
    assert yaml.safe_load(config)["controller"]["drain_grace_s"] == drain_s


def test_an_arena_on_a_gpu_takes_no_memory_of_the_node(tmp_path: Path) -> None:
    """Then the margin is what is asked for, and a GPU."""
    values = {"attention": {"arena": "64GiB", "device": "cuda"}}
    spec = _named(_rendered(tmp_path, values), "StatefulSet", "-attention")["spec"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"] == {"memory": "512Mi", "nvidia.com/gpu": "1"}


def test_prices_lie_beside_the_configuration_file_that_names_them(tmp_path: Path) -> None:
    """With the devices that are paid for, as values say; without prices there is neither."""
    cost = {"dense": "core", "attention": "core"}
    values = {"monitoring": {"prices": "[core]\n"}, "config": {"telemetry": {"cost": cost}}}
    files = config_files(_rendered(tmp_path, values))
    named = yaml.safe_load(files["config.yaml"])["telemetry"]["cost"]
    assert named == {**cost, "prices": "/etc/anabranch/config/prices.toml"}
    assert files["prices.toml"].strip() == "[core]"
    assert config_files(_rendered(tmp_path, {})).keys() == {"config.yaml"}


def _checksum(objects: list[Manifest], kind: str, name: str) -> str:
    template = _named(objects, kind, name)["spec"]["template"]
    return str(template["metadata"]["annotations"]["checksum/config"])


def test_scaling_restarts_nobody_and_a_changed_key_everybody(tmp_path: Path) -> None:
    """The checksum in pods changes with the file, but not with the numbers of pods."""
    plain = _checksum(_rendered(tmp_path, {}), "Deployment", "-gateway")
    scaled = {"gateway": {"replicas": 5}, "dense": {"replicas": 3}, "attention": {"replicas": 7}}
    assert _checksum(_rendered(tmp_path, scaled), "Deployment", "-gateway") == plain
    changed = {"config": {"dense": {"step_tokens": 512}}}
    assert _checksum(_rendered(tmp_path, changed), "Deployment", "-gateway") != plain


def test_a_model_from_elsewhere_is_fetched_where_the_file_says(tmp_path: Path) -> None:
    """The init container is told the source and the name of the folder that the configuration file names, and
    gets its secrets by reference; the role's container does not.
    """
    secret = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    values = {"model": {"name": "river", "source": "someone/river@0123", "extraEnv": [secret]}}
    objects = _rendered(tmp_path, values)
    pod = _named(objects, "StatefulSet", "-dense")["spec"]["template"]["spec"]
    (fetch,) = pod["initContainers"]
    assert fetch["command"] == ["anabranch", "model", "fetch", "someone/river@0123", "--name", "river"]
    assert secret in fetch["env"]
    assert secret not in pod["containers"][0]["env"]
    cache = next(each["value"] for each in fetch["env"] if each["name"] == "ANABRANCH_CACHE")
    config = yaml.safe_load(config_files(objects)["config.yaml"])
    assert config["model"]["path"] == f"{cache}/models/river"


def test_objects_of_an_operator_that_is_absent_are_left_out(tmp_path: Path) -> None:
    """Without monitoring.coreos.com/v1 the chart installs all the same."""
    file = tmp_path / "values.yaml"
    file.write_text("{}")
    outcome = helm(4, "template", "demo", str(CHART), "-f", str(file))
    assert outcome.returncode == 0
    assert {each["kind"] for each in manifests(outcome.stdout)}.isdisjoint({"PodMonitor", "PrometheusRule"})


def test_secrets_are_references(tmp_path: Path) -> None:
    """Passwords and keys come from Secrets that exist; the chart makes none, and its config names files."""
    values = {
        "registry": {"builtIn": True, "passwordSecret": {"name": "word"}},
        "apiKeys": {"existingSecret": "keys"},
    }
    objects = _rendered(tmp_path, values)
    assert "Secret" not in {each["kind"] for each in objects}
    for kind, name in (("StatefulSet", "-redis"), ("StatefulSet", "-controller"), ("Deployment", "-gateway")):
        container = _named(objects, kind, name)["spec"]["template"]["spec"]["containers"][0]
        assert {"name": "word", "key": "password"} in [
            each.get("valueFrom", {}).get("secretKeyRef") for each in container["env"]
        ]


def _rights(objects: list[Manifest]) -> set[tuple[str, str, str]]:
    (role,) = (each for each in objects if each["kind"] == "Role")
    return {
        (resource, name, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for name in rule["resourceNames"]
        for verb in rule["verbs"]
    }


def test_the_autoscaler_may_change_two_numbers_and_nothing_else(tmp_path: Path) -> None:
    """Its Role names both StatefulSets; a dry run, which is the default, may only read their numbers."""
    names = ("demo-anabranch-dense", "demo-anabranch-attention")
    dry = _rendered(tmp_path, {"autoscaler": {"enabled": True}})
    assert _rights(dry) == {("statefulsets/scale", name, "get") for name in names}
    command = _named(dry, "Deployment", "-autoscaler")["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "--apply" not in command
    changing = _rendered(tmp_path, {"autoscaler": {"enabled": True, "dryRun": False}})
    verbs = {("statefulsets/scale", "get"), ("statefulsets/scale", "patch")}
    verbs |= {("statefulsets", "list"), ("statefulsets", "watch")}
    assert _rights(changing) == {(resource, name, verb) for resource, verb in verbs for name in names}


def test_the_autoscaler_takes_its_command(tmp_path: Path) -> None:
    """The rendered flags are flags of the process, which then asks for a pod's service account."""
    objects = _rendered(tmp_path, {"autoscaler": {"enabled": True, "dryRun": False}})
    pod = _named(objects, "Deployment", "-autoscaler")["spec"]["template"]["spec"]
    config = tmp_path / "config.yaml"
    config.write_text(_named(objects, "ConfigMap", "-config")["data"]["config.yaml"])
    words = [
        str(config) if word.endswith("config.yaml") else word for word in pod["containers"][0]["command"]
    ]
    outcome = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, check=False, timeout=60
    )
    assert outcome.returncode == 2
    assert "service account" in outcome.stderr
