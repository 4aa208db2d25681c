"""Where a model folder came from and what its files must look like, recorded beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from anabranch.cli.models.catalogue import CatalogueEntry
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


def write_provenance(folder: Path, entry: CatalogueEntry, converter_version: int) -> None:
    """Record source, converter and each file's size and hash in `folder`."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    record = {
        "name": entry.name,
        "licence": entry.licence,
        "source": asdict(entry.source),
        "converter_version": converter_version,
        "files": files,
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_current(folder: Path, entry: CatalogueEntry, converter_version: int) -> bool:
    """Whether `folder` was made from the source `entry` names, by this converter."""
    record = _record(folder)
    return record.get("source") == asdict(entry.source) and (
        record.get("converter_version") == converter_version
    )


def read_licence(folder: Path) -> str | None:
    """The licence recorded at the fetch; None for a folder that was not fetched."""
    return str(_record(folder)["licence"]) if (folder / PROVENANCE_FILE).is_file() else None


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
