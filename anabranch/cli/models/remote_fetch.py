"""The files of a model that lies elsewhere: each downloaded once, and checked before the next begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anabranch.cli.models.progress import FetchProgress
from anabranch.cli.models.provenance import Origin
from anabranch.cli.models.remote import Remote, RemoteFile
from anabranch.cli.models.web import Web, without_query
from cluster.errors import BrokenModelFolder
from cluster.model_spec import ModelSpec
from cluster.weight_files import find_weight_files

_CONFIG = "config.json"


def origin_of(remote: Remote, name: str, files: Sequence[RemoteFile]) -> Origin:
    """What a folder of these files is made from."""
    named = "" if name == remote.name else f" --name {name}"
    source = {"place": remote.spelled, "files": {file.name: file.digest for file in files}}
    return Origin(f"{remote.spelled}{named}", source)


def download_files(web: Web, files: Sequence[RemoteFile], folder: Path, progress: FetchProgress) -> None:
    """Leave exactly `files` in `folder`; what an earlier attempt has left there is used.

    The configuration comes first, so that a model that cannot be served is refused before its weights come.
    Raises `UnsupportedModel`, `BrokenModelFolder` (no model, or a file with another hash), and what
    `Web.download` does.
    """
    if _CONFIG not in (file.name for file in files):
        raise BrokenModelFolder(f"there is no {_CONFIG} among the files: is this the folder of a model?")
    folder.mkdir(exist_ok=True)
    _remove_others(folder, files)
    for file in sorted(files, key=lambda file: (file.name != _CONFIG, file.name)):
        _download(web, file, folder, progress)
        if file.name == _CONFIG:
            ModelSpec.from_folder(folder)
    if not find_weight_files(folder):
        raise BrokenModelFolder(
            "there are no weights among the files: model.safetensors, or several and their index"
        )


def _remove_others(folder: Path, files: Sequence[RemoteFile]) -> None:
    wanted = {file.name for file in files}
    for path in folder.iterdir():
        if path.name.removesuffix(".part") not in wanted:
            path.unlink()


def _download(web: Web, file: RemoteFile, folder: Path, progress: FetchProgress) -> None:
    whole, part = folder / file.name, folder / f"{file.name}.part"
    if whole.exists():
        progress.begin(f"checking {file.name}", file.size_bytes)
        if file.is_at(whole):
            return
        whole.unlink()
    progress.begin(f"downloading {file.name}", file.size_bytes)
    web.download(file.url, part, progress.update)
    if not file.is_at(part):
        part.unlink()
        raise BrokenModelFolder(
            f"{without_query(file.url)} is not the file with {file.digest}: fetch again; if that does not"
            " help, it was changed"
        )
    part.rename(whole)
