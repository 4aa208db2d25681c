"""The safetensors files of a model folder: what lies where, checked before a byte of it is used.

A safetensors file is 8 bytes of little-endian header length, a JSON header naming each tensor's dtype,
shape and byte range, then the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.config_reader import ConfigReader
from cluster.errors import BrokenModelFolder

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_BYTES_MAX = 100 * 2**20
"""The limit of the safetensors format."""

ELEMENT_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Sizes of the number types whose byte ranges are checked, by safetensors' names."""

SAMPLE_BYTES = 512
"""Read at the start, middle and end of every tensor for the fingerprint."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies; `start` and `end` are byte offsets in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder in a fixed order; empty when it holds none.

    An index wins over a single file, as in transformers. Raises `BrokenModelFolder` when the index
    names a file that is not there.
    """
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        single = folder / SINGLE_FILE
        return (single,) if single.exists() else ()
    names = ConfigReader.open(index_path).nested("weight_map").values.values()
    files = sorted({str(name) for name in names})
    if not files:
        raise BrokenModelFolder(f"{index_path} lists no files: download it again")
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise BrokenModelFolder(f"{folder / name} is missing though {INDEX_FILE} names it: download it")
    return tuple(folder / name for name in files)


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by name; raises `BrokenModelFolder` when there are none or a file lies."""
    files = find_weight_files(folder)
    if not files:
        raise BrokenModelFolder(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: download the weights in safetensors form"
        )
    return {tensor.name: tensor for path in files for tensor in read_header(path)}


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, each checked to lie inside it; raises `BrokenModelFolder`."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= header_bytes <= min(HEADER_BYTES_MAX, file_bytes - 8):
                raise BrokenModelFolder(f"{path} is truncated or no safetensors file: download it again")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        return [
            _read_entry(path, name, entry, 8 + header_bytes, file_bytes) for name, entry in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenModelFolder(f"{path} has an unreadable header ({error!r}): download it again") from error


def _read_entry(
    path: Path, name: str, entry: dict[str, list[int]], base: int, file_bytes: int
) -> StoredTensor:
    """One header entry; malformed ones raise what `read_header` translates."""
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    start, end = (base + offset for offset in entry["data_offsets"])
    if end > file_bytes:
        raise BrokenModelFolder(
            f"{path} is truncated: {name} ends at byte {end} of {file_bytes}; download it again"
        )
    data_bytes = math.prod(shape) * ELEMENT_BYTES[dtype] if dtype in ELEMENT_BYTES else end - start
    if not base <= start <= end or end - start != data_bytes:
        raise BrokenModelFolder(f"{path}: {name} ({dtype} {shape}) has a wrong byte range; download it again")
    return StoredTensor(name, path, dtype, shape, start, end)


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """A hash that differs between two models of one architecture: names, shapes and sampled bytes.

    Samples three places of every tensor instead of reading gigabytes: training and merging change
    every element of a matrix. It tells models apart; it does not detect tampering.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in {t.path for t in tensors.values()}}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            for place in (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - SAMPLE_BYTES):
                at = max(place, tensor.start)
                digest.update(os.pread(files[tensor.path].fileno(), min(SAMPLE_BYTES, tensor.end - at), at))
    return digest.hexdigest()
