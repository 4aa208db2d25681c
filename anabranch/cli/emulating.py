"""`anabranch up --emulate`: processes of a tiny model that keep the time of devices nobody here has."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from anabranch.cli.chaos import model as tiny
from cluster import hardware
from cluster.emulation import KEPT_TIME
from cluster.errors import ConfigError, InvalidRequest
from cluster.model_spec import ModelSpec
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, Side, parse_side
from loadgen.simulation.models import SimulatedModel

_PROCESSES_PER_CORE = 4
"""Processes mostly wait for their padding; more than this many would wait for each other."""

_BLOCK_TOKENS = 32
_DEADLINE_MS = 600_000
_LANE_DEADLINE_MS = 2000


def overrides(text: str, shape_name: str, dilation: float, folder: Path) -> dict[str, Any]:
    """The configuration of an emulated cluster; its tiny model is written into `folder`, where it is not yet.

    `text`: `h100x2,h20x4`, or `h100x4` alone where the cache lies beside the weights. Raises InvalidRequest,
    and ConfigError for a shape that this machine has too few cores for.
    """
    if dilation < 1:
        raise InvalidRequest(f"--dilation {dilation:g}: at least 1")
    shape, model = _shape(text), models.resolve(shape_name)
    _require_cores(shape)
    tokens = int(shape.cache_bytes(model.shape, Efficiencies()) // model.shape.kv_token_bytes)
    spec = _tiny_model(folder, model)
    arena = (tokens + _BLOCK_TOKENS) * spec.geometry("float32", _BLOCK_TOKENS).token_bytes
    workers = shape.attention.devices if shape.attention else 0
    return {
        "model.path": str(folder),
        "model.name": shape_name,
        "model.dtype": "float32",
        "dense.replicas": 1,
        "attention.replicas": workers,
        ("attention.arena" if workers else "dense.local_arena"): arena,
        "dense.step_tokens": 2048,
        "dense.max_batch": 1024,
        "dense.cores": [],
        "attention.cores": [],
        "lanes.spin_us": 0,
        "lanes.deadline_floor_ms": round(_LANE_DEADLINE_MS * dilation),
        "gateway.default_deadline_ms": round(_DEADLINE_MS * dilation),
        "gateway.max_streams": 4096,
        "emulation": _emulation(shape, model, dilation),
    }


def _emulation(shape: Shape, model: SimulatedModel, dilation: float) -> dict[str, Any]:
    return {
        "dilation": dilation,
        "model": {
            "weight_bytes": model.shape.weight_bytes,
            "element_bytes": model.shape.element_bytes,
            "layers": model.shape.layers,
            "hidden_size": model.shape.hidden_size,
            "query_group": model.shape.query_group,
        },
        "dense": _device(shape.dense, shape.dense.devices),
        "attention": _device(shape.attention, 1) if shape.attention else None,
    }


def _device(side: Side, devices: int) -> dict[str, Any]:
    kind = side.kind
    return {
        "devices": devices,
        "flops_per_s": kind.flops_per_s,
        "bandwidth_bytes_per_s": kind.bandwidth_bytes_per_s,
        "network_bytes_per_s": kind.network_bytes_per_s or kind.bandwidth_bytes_per_s,
    }


def _shape(text: str) -> Shape:
    catalogue = hardware.built_in()
    dense, *attention = (parse_side(part.strip(), catalogue) for part in text.split(","))
    if len(attention) > 1:
        raise InvalidRequest(f"--emulate {text}: dense devices, and attention workers behind a comma")
    return Shape(dense, attention[0] if attention else None)


def _require_cores(shape: Shape) -> None:
    """Raise ConfigError where the processes would keep each other waiting."""
    processes = 2 + (shape.attention.devices if shape.attention else 0)
    cores = len(os.sched_getaffinity(0))
    if processes > _PROCESSES_PER_CORE * cores:
        raise ConfigError(
            f"{shape} takes {processes} processes; {cores} cores keep the time of "
            f"{_PROCESSES_PER_CORE * cores} at most: emulate fewer attention workers, or simulate "
            "(`anabranch loadgen simulate`)"
        )


def _tiny_model(folder: Path, model: SimulatedModel) -> ModelSpec:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write(folder, model.context_tokens)
    return ModelSpec.from_folder(folder)


def report(logs: Path, attention_workers: int) -> list[str]:
    """A line for each process of a cluster that has ended: how many of its calls were late."""
    lines = []
    for slot in ("dense-0", *(f"attention-{index}" for index in range(attention_workers))):
        file = logs / f"{slot}.log"
        told = [line for line in file.read_text("utf-8").splitlines() if f'"{KEPT_TIME}"' in line]
        if told:
            found = json.loads(told[-1])
            lines.append(
                f"{slot}: {found['late']:,} of {found['calls']:,} calls took longer than their padding "
                f"({found['late_share']:.2%})"
            )
    return lines
