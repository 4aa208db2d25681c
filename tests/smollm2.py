"""The real model of the tests: SmolLM2-135M-Instruct, fetched once into the user's cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from anabranch.cli.models.catalogue import DEFAULT_MODEL
from anabranch.cli.models.progress import SilentProgress
from anabranch.cli.models.store import ModelStore, cache_folder


@cache
def smollm2_folder() -> Path:
    """Its folder; downloads (93 MB) and converts it where the cache does not have it yet."""
    return ModelStore(cache_folder()).fetch(DEFAULT_MODEL, SilentProgress())
