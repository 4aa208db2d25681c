"""Which model is simulated: a shape of `models.toml`, or that of any config.json."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cluster.errors import InvalidRequest
from cluster.model_spec import ModelSpec
from cluster.perfmodel import ModelShape

ELEMENT_BYTES = 2
"""Weights and KV cache are of 16 bits."""


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What of a model decides how long its steps take. `shape.hidden_size` is the width of its queries."""

    name: str
    shape: ModelShape
    context_tokens: int


def resolve(name: str) -> SimulatedModel:
    """A bundled shape, or that of a folder with a config.json (or of the file itself). Raises
    InvalidRequest, naming those bundled; BrokenModelFolder or UnsupportedModel for a folder we cannot read.
    """
    known = bundled()
    if name in known:
        return known[name]
    path = Path(name)
    folder = path.parent if path.name == "config.json" else path
    if (folder / "config.json").is_file():
        return of_spec(folder.resolve().name, ModelSpec.from_folder(folder))
    raise InvalidRequest(f"no model {name!r}: give a folder with a config.json, or one of {', '.join(known)}")


def bundled() -> Mapping[str, SimulatedModel]:
    """The shapes of `models.toml`, by name."""
    tables = tomllib.loads((files("loadgen.simulation") / "models.toml").read_text("utf-8"))
    return {name: _bundled(name, table) for name, table in tables.items()}


def of_spec(name: str, spec: ModelSpec) -> SimulatedModel:
    """The shape of a model we can serve. Raises InvalidRequest for sliding windows, which no step counts."""
    if spec.window_tokens is not None:
        raise InvalidRequest(f"{name} has sliding windows, which a simulation does not model")
    shape = ModelShape(
        weight_bytes=float(spec.parameters * ELEMENT_BYTES),
        element_bytes=ELEMENT_BYTES,
        layers=spec.layers,
        hidden_size=spec.query_heads * spec.head_size,
        query_group=spec.query_heads // spec.kv_heads,
    )
    return SimulatedModel(name, shape, spec.max_sequence_length)


def _bundled(name: str, table: Mapping[str, Any]) -> SimulatedModel:
    shape = ModelShape(
        weight_bytes=table["weight_bytes"],
        element_bytes=ELEMENT_BYTES,
        layers=table["layers"],
        hidden_size=table["hidden_size"],
        query_group=table["query_group"],
    )
    return SimulatedModel(name, shape, table["context"])
