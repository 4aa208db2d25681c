"""`anabranch up --emulate`: processes of a tiny model that keep the time of devices nobody here has."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.cli.chaos import model as tiny
from cluster import config as configuration
from cluster import hardware
from cluster.emulation import KEPT_TIME
from cluster.errors import ConfigError, InvalidRequest
from cluster.model_spec import ModelSpec
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, Side, parse_side
from loadgen.simulation.models import SimulatedModel
from loadgen.simulation.simulation import LARGE, SimulatedCluster

_PROCESSES_PER_CORE = 4
"""Processes mostly wait for their padding; more than this many would wait for each other."""

_BLOCK_TOKENS = 32
_DEADLINE_MS = 600_000
_LANE_DEADLINE_MS = 2000


def cluster_of(text: str, shape_name: str) -> SimulatedCluster:
    """`h100x2,h20x4`, or `h100x4` alone where the cache lies beside the weights. Raises InvalidRequest."""
    return SimulatedCluster(models.resolve(shape_name), _shape(text), configuration.load(None, LARGE))


def overrides(cluster: SimulatedCluster, dilation: float, folder: Path) -> dict[str, Any]:
    """The configuration of a cluster whose processes keep the time of one that could be simulated; its tiny
    model is written into `folder`. Raises InvalidRequest, and ConfigError for a shape that this machine has
    too few cores for.
    """
    if dilation < 1:
        raise InvalidRequest(f"--dilation {dilation:g}: at least 1")
    shape, model, dense = cluster.shape, cluster.model, cluster.config.dense
    _require_cores(shape)
    spec = _tiny_model(folder, model)
    arena = (cluster.arena_tokens + _BLOCK_TOKENS) * spec.geometry("float32", _BLOCK_TOKENS).token_bytes
    workers = shape.attention.devices if shape.attention else 0
    return {
        "model.path": str(folder),
        "model.name": model.name,
        "model.dtype": "float32",
        "dense.replicas": shape.dense_workers,
        "attention.replicas": workers,
        ("attention.arena" if workers else "dense.local_arena"): arena,
        "dense.step_tokens": dense.step_tokens,
        "dense.max_batch": dense.max_batch,
        "dense.max_waiting": dense.max_waiting,
        "dense.cores": [],
        "attention.cores": [],
        "lanes.spin_us": 0,
        "lanes.deadline_floor_ms": round(_LANE_DEADLINE_MS * dilation),
        "gateway.default_deadline_ms": round(_DEADLINE_MS * dilation),
        "gateway.max_streams": 4096,
        "emulation": _emulation(cluster, dilation),
    }


def _emulation(cluster: SimulatedCluster, dilation: float) -> dict[str, Any]:
    shape, model, reached = cluster.shape, cluster.model, cluster.efficiencies
    return {
        "dilation": dilation,
        "model": {
            "weight_bytes": model.shape.weight_bytes,
            "element_bytes": model.shape.element_bytes,
            "layers": model.shape.layers,
            "hidden_size": model.shape.hidden_size,
            "query_group": model.shape.query_group,
        },
        "dense": _device(shape.dense, shape.dense.devices, reached),
        "attention": _device(shape.attention, 1, reached) if shape.attention else None,
        "network_share": reached.network,
        "round_trip_s": reached.round_trip_s,
        "overlaps": cluster.switches.overlaps,
    }


def _device(side: Side, devices: int, reached: Efficiencies) -> dict[str, Any]:
    kind = side.kind
    return {
        "devices": devices,
        "flops_per_s": kind.flops_per_s * reached.flops,
        "bandwidth_bytes_per_s": kind.bandwidth_bytes_per_s * reached.bandwidth,
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
    processes = 1 + shape.dense_workers + (shape.attention.devices if shape.attention else 0)
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


@dataclass(frozen=True, slots=True)
class KeptTime:
    """How many calls of a process took longer than their padding."""

    slot: str
    calls: int
    late: int

    def __str__(self) -> str:
        share = self.late / self.calls
        return (
            f"{self.slot}: {self.late:,} of {self.calls:,} calls took longer than their padding ({share:.2%})"
        )


def log_sizes(logs: Path) -> dict[str, int]:
    """Bytes of each process's log: the next cluster's lines come behind them."""
    return {file.stem: file.stat().st_size for file in logs.glob("*.log")}


def report(
    logs: Path, dense_workers: int, attention_workers: int, before: Mapping[str, int] | None = None
) -> list[KeptTime]:
    """Of each process of a cluster that has ended, and had begun. `before`: `log_sizes` before the cluster,
    where there may have been others.
    """
    slots = [f"dense-{index}" for index in range(dense_workers)]
    slots += [f"attention-{index}" for index in range(attention_workers)]
    kept = []
    for slot in slots:
        file = logs / f"{slot}.log"
        if not file.exists():
            continue
        lines = file.read_bytes()[(before or {}).get(slot, 0) :].decode("utf-8", "replace").splitlines()
        told = [line for line in lines if f'"{KEPT_TIME}"' in line]
        if told:
            found = json.loads(told[-1])
            kept.append(KeptTime(slot, found["calls"], found["late"]))
    return kept
