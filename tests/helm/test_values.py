"""The chart's generated files and rendered examples, as far as no Helm is needed to judge them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster import config as configuration
from cluster.config import Config
from deploy.helm.generate import OWNED, files
from deploy.helm.values import Values
from tests.helm.charts import CHART, EXAMPLES, config_text, manifests

SHAPES = sorted(path.name for path in EXAMPLES.iterdir())


def _valid(values: dict[str, Any]) -> bool:
    schema = json.loads((CHART / "values.schema.json").read_text())
    try:
        jsonschema.validate(values, schema, jsonschema.Draft7Validator)
    except jsonschema.ValidationError:
        return False
    return True


def test_generated_files_are_those_of_the_values() -> None:
    """values.yaml, its schema and the README's table say what deploy/helm/values.py says: `make chart`."""
    assert [str(path) for path, text in files().items() if path.read_text() != text] == []


def test_the_schema_carries_what_it_refers_to() -> None:
    """Helm reads one file: a reference to a definition elsewhere makes every install fail."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    referred = set(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)))
    assert referred <= schema["$defs"].keys()


def test_every_value_is_described_and_the_defaults_are_valid() -> None:
    """Each key has words in values.yaml, and the file passes its own schema."""
    text = (CHART / "values.yaml").read_text().splitlines()
    for above, line in itertools.pairwise(text):
        assert line.lstrip().startswith("#") or above.lstrip().startswith("#"), line
    values = yaml.safe_load("\n".join(text))
    assert _valid(values)
    assert Values.model_validate(values) == Values()


@pytest.mark.parametrize(
    "wrong",
    [
        {"atention": {}},
        {"attention": {"arenas": "1GiB"}},
        {"attention": {"arena": "1Gi"}},
        {"attention": {"arena": "1.5GiB"}},
        {"attention": {"resources": {"limits": {"memory": "2GiB"}}}},
        {"controller": {"replicas": 2}},
        {"gateway": {"device": "cuda"}},
        {"registry": {"url": "redis://:secret@redis:6379"}},
        {"config": {"dense": {"thread": 2}}},
        {"config": {"attention": {"tiers": [{"arena": "1GiB"}]}}},
        {"config": {"dense": {"threads": "two"}}},
        {"config": {"dense": {"local_arena": "1Gi"}}},
        {"config": {"dense": {"port": 1}}},
        {"config": {"ray": {"address": "head:6379"}}},
    ],
    ids=str,
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    """Unknown keys, units of the other kind, secrets in an address, and keys that the chart sets itself."""
    assert not _valid(wrong)


def test_the_schema_takes_every_key_of_the_configuration_file_that_the_chart_does_not_set() -> None:
    """All defaults of the file pass below `config`, but for those that are the chart's; these exist."""
    shown = Config().model_dump(mode="json", exclude={"emulation", "ray", "state_dir"})
    for section, keys in OWNED.items():
        for key in keys:
            del shown[section][key]
    assert _valid({"config": shown})


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rendered_configuration_file_is_one_of_ours(shape: str, tmp_path: Path) -> None:
    """What `anabranch up --config` reads is what the ConfigMap holds, with the values in it."""
    values = yaml.safe_load((EXAMPLES / shape / "values.yaml").read_text())
    file = tmp_path / "config.yaml"
    file.write_text(config_text(manifests((EXAMPLES / shape / "rendered.yaml").read_text())))
    config = configuration.load(file)
    assert config.placement.own_addresses
    assert config.model.name == values.get("model", {}).get("name", Values().model.name)
    for section, keys in values.get("config", {}).items():
        for key, value in keys.items():
            wanted = configuration.load(None, {"attention.replicas": 1, f"{section}.{key}": value})
            assert getattr(getattr(config, section), key) == getattr(getattr(wanted, section), key)


@pytest.mark.parametrize("shape", SHAPES)
def test_pods_may_write_nowhere_but_into_their_volumes(shape: str) -> None:
    """Every container, init containers too: not root, root read-only, no capability, limits; and a token for
    the autoscaler alone.
    """
    for each in manifests((EXAMPLES / shape / "rendered.yaml").read_text()):
        template = each.get("spec", {}).get("template", each)
        pod = template.get("spec", {})
        for container in [*pod.get("containers", []), *pod.get("initContainers", [])]:
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"]
            assert allowed["capabilities"] == {"drop": ["ALL"]}
            assert not allowed["allowPrivilegeEscalation"]
            assert "memory" in container["resources"]["limits"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            speaks_to_kubernetes = pod["containers"][0]["name"] == "autoscaler"
            assert pod["automountServiceAccountToken"] == speaks_to_kubernetes
