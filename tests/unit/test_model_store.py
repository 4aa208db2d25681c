"""Finding the cache, converting names and rows, describing a folder, the commands' output."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from anabranch.cli import model
from anabranch.cli.__main__ import app, reporting
from anabranch.cli.models.catalogue import CATALOGUE, DEFAULT_MODEL
from anabranch.cli.models.convert import convert_gguf, to_half_rotation
from anabranch.cli.models.describe import describe
from anabranch.cli.models.store import cache_folder
from anabranch.cli.models.tokenizer_files import TokenizerFacts, build_tokenizer
from cluster.errors import BrokenModelFolder, UnsupportedModel
from tests.gguf_package import write_gguf


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder converted from a tiny GGUF file."""
    write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "tiny"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder, lambda _done: None)
    return folder


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ANABRANCH_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, Path("/a")),
        ({"ANABRANCH_CACHE": "", "XDG_CACHE_HOME": "/x"}, Path("/x/anabranch")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache/anabranch"),
        ({}, Path.home() / ".cache/anabranch"),
    ],
)
def test_cache_folder(environment: dict[str, str], expected: Path) -> None:
    """The project's own variable goes before the desktop standard, and empty counts as unset."""
    assert cache_folder(environment) == expected


def test_rotation_order_is_undone() -> None:
    """Rotating pairs (2i, 2i+1) of the stored rows equals rotating halves (i, i + d/2) of the converted."""
    generator = np.random.default_rng(1)
    heads, head_size, columns = 3, 8, 5
    stored = generator.normal(size=(heads * head_size, columns)).astype(np.float32)
    hidden, angles = generator.normal(size=columns), generator.normal(size=head_size // 2)
    pairs = (stored @ hidden).reshape(heads, head_size // 2, 2)
    interleaved = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    halves = (to_half_rotation(stored, heads) @ hidden).reshape(heads, 2, head_size // 2)
    half_split = (halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * angles)
    np.testing.assert_allclose(half_split, interleaved, rtol=1e-6)


def test_conversion_is_reproducible(tmp_path: Path, tiny_folder: Path) -> None:
    """The same GGUF file gives the same bytes, so that recorded hashes mean something."""
    again = tmp_path / "again"
    again.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", again, lambda _done: None)
    for path in tiny_folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_conversion_reports_all_bytes(tmp_path: Path) -> None:
    """Progress grows and its last figure is the size of all tensors."""
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "tiny").mkdir()
    steps: list[int] = []
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "tiny", steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 4 * describe(tmp_path / "tiny").parameters  # the file holds float32


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    """Garbage and truncated files are named as such."""
    (tmp_path / "garbage.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(BrokenModelFolder, match=r"garbage\.gguf is no readable GGUF file"):
        convert_gguf(tmp_path / "garbage.gguf", tmp_path, lambda _done: None)


def test_unknown_pre_tokenizers_are_refused() -> None:
    """Rules that are not written down are never guessed: a wrong split gives wrong answers silently."""
    facts = TokenizerFacts("gpt2", "other", [], [], [], {}, False, None, 1)
    with pytest.raises(UnsupportedModel, match="'other' cannot be converted"):
        build_tokenizer(facts)


def test_a_bos_that_the_file_asks_for_is_added() -> None:
    """`add_bos_token` of the GGUF file becomes the tokenizer's post-processor."""
    facts = TokenizerFacts(
        "gpt2", "smollm", ["<s>", "a", "b"], [3, 1, 1], [], {"bos_token": 0}, True, None, 1
    )
    tokenizer = build_tokenizer(facts)
    assert tokenizer.encode("ab").ids == [0, 1, 2]
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [1, 2]


def test_description_counts_what_is_stored(tiny_folder: Path) -> None:
    """Figures follow from the shape: 2 (k and v) x 2 layers x 2 heads x 8 x element bytes per token."""
    description = describe(tiny_folder)
    assert description.kv_bytes_per_token_float32 == 2 * 2 * 2 * 8 * 4
    assert description.kv_bytes_per_token_bfloat16 == 2 * 2 * 2 * 8 * 2
    assert description.weight_bytes == 2 * description.parameters
    assert description.rope == "default, theta 10000"
    assert description.tokenizer.startswith("BPE, ByteLevel, 2")
    assert description.has_chat_template
    assert description.licence is None


def test_licence_of_a_model_card(tiny_folder: Path) -> None:
    """A folder that was not fetched states its licence in the head of its model card."""
    (tiny_folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Model\n")
    assert describe(tiny_folder).licence == "mit"


def test_inspect_prints_a_table_and_json(tiny_folder: Path) -> None:
    """Any Hugging Face folder can be inspected, for people and for programs."""
    table = CliRunner().invoke(model.app, ["inspect", str(tiny_folder)], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    assert "LlamaForCausalLM" in table.output
    printed = CliRunner().invoke(model.app, ["inspect", str(tiny_folder), "--json"])
    facts = json.loads(printed.stdout)
    assert (facts["architecture"], facts["layers"]) == ("LlamaForCausalLM", 2)


@pytest.mark.parametrize("command", [["model", "inspect"], ["up", "--model"]], ids=["inspect", "up"])
def test_a_model_that_cannot_be_served_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A wrong name or an empty folder: status 2 and the same words, whichever command is asked."""
    for name, said in (("nonsense", f"({DEFAULT_MODEL})"), (str(tmp_path), "config.json")):
        assert reporting(partial(app, [*command, name], standalone_mode=False)) == 2
        told = capsys.readouterr().err
        assert told.startswith("anabranch: ")
        assert said in told
        assert len(told.splitlines()) == 1


def test_list_shows_what_is_not_fetched(tmp_path: Path) -> None:
    """With an empty cache every model of the catalogue is listed as not fetched."""
    result = CliRunner().invoke(model.app, ["list", "--json"], env={"ANABRANCH_CACHE": str(tmp_path)})
    assert {each["name"]: each["state"] for each in json.loads(result.stdout)} == dict.fromkeys(
        CATALOGUE, "not fetched"
    )
