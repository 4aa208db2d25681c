"""Where a model folder came from and what its files must look like, recorded beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config_reader import ConfigReader
from cluster.errors import BrokenModelFolder

PROVENANCE_FILE = "provenance.json"
_CHUNK_BYTES = 4 * 2**20


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; `advance` is told the bytes read so far."""
    digest, done_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            if advance is not None:
                advance(done_bytes)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model folder is made from; another origin makes another folder."""

    command: str
    """What gets it again: words behind `anabranch model fetch`."""
    source: Mapping[str, Any]
    """Pins every byte."""
    licence: str | None = None
    converter_version: int | None = None
    """None where nothing is converted."""


def write_provenance(folder: Path, name: str, origin: Origin) -> None:
    """Record the origin and each file's size and hash in `folder`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    record = {"name": name, **asdict(origin), "files": files}
    (folder / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_current(folder: Path, origin: Origin) -> bool:
    """Whether `folder` was made from this origin, by this converter."""
    record = _record(folder)
    return record.get("source") == origin.source and (
        record.get("converter_version") == origin.converter_version
    )


def read_command(folder: Path) -> str:
    """What gets the model of a fetched folder again: words behind `anabranch model fetch`."""
    return str(_record(folder).get("command", ""))


def read_licence(folder: Path) -> str | None:
    """The licence recorded at the fetch; None where none was, or nothing was fetched."""
    licence = _record(folder).get("licence") if (folder / PROVENANCE_FILE).is_file() else None
    return None if licence is None else str(licence)


def check_sizes(folder: Path) -> None:
    """Raise `BrokenModelFolder` naming the first recorded file that is missing or of another size."""
    for name, expected in _recorded_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise BrokenModelFolder(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise BrokenModelFolder(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")


def check_contents(folder: Path) -> None:
    """As `check_sizes`, and read every file to compare its hash."""
    check_sizes(folder)
    for name, expected in _recorded_files(folder).items():
        if sha256_of(folder / name) != expected["sha256"]:
            raise BrokenModelFolder(f"{folder / name} has changed since it was fetched")


def _recorded_files(folder: Path) -> dict[str, dict[str, object]]:
    files = _record(folder).get("files")
    if not isinstance(files, dict) or not all(isinstance(each, dict) for each in files.values()):
        raise BrokenModelFolder(f"{folder / PROVENANCE_FILE} lists no files")
    return files


def _record(folder: Path) -> dict[str, object]:
    return ConfigReader.open(folder / PROVENANCE_FILE).values
