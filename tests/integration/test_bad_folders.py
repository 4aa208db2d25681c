"""Model folders that cannot be served: the role that reads them ends with status 2 and one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anabranch.cli.preflight import require_servable
from cluster import config as configuration
from cluster.errors import ConfigError, ModelError
from cluster.model_spec import ModelSpec
from cluster.weight_files import read_stored_tensors
from cluster.weight_shapes import weight_shapes
from tests.models import FAMILIES, tiny_model

_END_S = 60.0


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that can be served."""
    return tiny_model(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)


def _truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _cut_config(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text()[:40])


def _change(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _cut_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])


def _spoil_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{% for"}))


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights truncated": ("dense", _truncate_weights, "truncated"),
    "another hidden size": ("dense", _change(hidden_size=128), "weight"),
    "config cut": ("gateway", _cut_config, "config.json"),
    "architecture": ("gateway", _change(architectures=["MambaForCausalLM"], model_type="mamba"), "Mamba"),
    "no heads": ("gateway", _change(num_attention_heads=0), "num_attention_heads"),
    "tokenizer cut": ("gateway", _cut_tokenizer, "tokenizer.json"),
    "chat template": ("gateway", _spoil_template, "template"),
}


@pytest.mark.parametrize(("role", "spoil", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_a_folder_that_cannot_be_served_is_one_line(
    whole_model: Path, tmp_path: Path, role: str, spoil: Callable[[Path], None], said: str
) -> None:
    """Status 2 (starting again would not help), and one line that names the file or field at fault."""
    folder = tmp_path / "model"
    shutil.copytree(whole_model, folder)
    spoil(folder)
    overrides = {"model.path": str(folder), "gateway.port": 0, "gateway.http_port": None}
    file = tmp_path / "config.yaml"
    file.write_text(configuration.load(None, overrides).to_yaml())
    command = [sys.executable, "-m", f"workers.{role}", "--config", str(file), "--controller", "127.0.0.1:1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=_END_S, check=False)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert ended.returncode == 2, ended.stderr[-2000:]
    assert len(lines) == 1, ended.stderr[-2000:]
    assert lines[0].startswith(f"{role}: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    ("said", "spoil"), [(fault[2], fault[1]) for fault in FAULTS.values()], ids=FAULTS.keys()
)
def test_up_refuses_it_before_anything_starts(
    whole_model: Path, tmp_path: Path, said: str, spoil: Callable[[Path], None]
) -> None:
    """`up` finds by itself what one of its roles would refuse much later."""
    folder = tmp_path / "model"
    shutil.copytree(whole_model, folder)
    require_servable(configuration.load(None, {"model.path": str(folder)}))
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        require_servable(configuration.load(None, {"model.path": str(folder)}))


@pytest.mark.parametrize(
    "placement",
    [{"hardware": "/nowhere.toml"}, {"dense_classes": ["abacus"]}, {"attention_classes": ["tin"]}],
)
def test_up_refuses_a_wrong_catalogue_before_ray_starts(
    whole_model: Path, placement: dict[str, object]
) -> None:
    """A hardware file that is not there, and classes it does not have, are found without Ray."""
    settings = {f"placement.{key}": value for key, value in placement.items()}
    with pytest.raises(ConfigError, match="placement"):
        require_servable(configuration.load(None, {"model.path": str(whole_model), **settings}))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_shapes_are_those_that_are_loaded(tmp_path: Path, architecture: str) -> None:
    """Every tensor of a whole model is asked for, and in its shape, whatever its architecture."""
    folder = tiny_model(tmp_path, architecture)
    stored = read_stored_tensors(folder)
    shapes = dict(weight_shapes(ModelSpec.from_folder(folder)))
    assert shapes == {name: tensor.shape for name, tensor in stored.items()}
