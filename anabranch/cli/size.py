"""`anabranch size`: how many workers, and how much memory, for a model, a context and a concurrency."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
import yaml
from rich.console import Console

from anabranch.cli.model import resolve as resolve_fetched
from cluster import hardware
from cluster.config_values import parse_bytes
from cluster.errors import InvalidRequest, ModelError
from cluster.perfmodel import ModelShape
from cluster.policies.autoscaler import AutoscalerPolicy
from cluster.sizing import Machines, Need, Size, size
from loadgen.simulation import models

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MIB = 2**20
_MARGIN_BYTES = 512 * _MIB
"""Beside an arena: interpreter, PyTorch, buffers of lanes; the chart's attention.memoryMargin."""
_DENSE_MARGIN_BYTES = 1024 * _MIB
"""Beside weights."""
_ARENA_SHARE = 0.8
"""Of a device's memory, where no arena is given."""

DTypeName = Literal["float32", "bfloat16", "float16"]


def size_command(
    model: Annotated[
        str,
        typer.Option(
            help="A fetched model's name, a folder with a config.json, or a shape such as llama3-8b."
        ),
    ] = "smollm2-135m-instruct",
    context: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and output.", min=1)] = 8192,
    concurrency: Annotated[int, typer.Option(help="Sequences at once.", min=1)] = 16,
    dtype: Annotated[DTypeName, typer.Option(help="Of weights and cache.")] = "bfloat16",
    tpot: Annotated[
        float | None, typer.Option(help="Longest time between two tokens, in milliseconds.", min=0.001)
    ] = None,
    dense: Annotated[
        str, typer.Option(help="Hardware of a dense worker (the catalogue's name).")
    ] = "cpu-node",
    attention: Annotated[str, typer.Option(help="Hardware of an attention worker.")] = "cpu-node",
    arena: Annotated[
        str | None,
        typer.Option(help="KV cache of an attention worker, as in 64GiB; else 80 % of its memory."),
    ] = None,
    hardware_file: Annotated[
        Path | None, typer.Option("--hardware", help="Another catalogue than cluster/hardware.toml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Print how many workers and how much memory a load needs, and the chart's values for it.

    Memory is computed; times are what the devices cannot beat. A quarter of the pool is left free.

    \b
    anabranch size --model llama3-8b --context 32768 --concurrency 64 --dense l40s --arena 64GiB
    anabranch size --model FOLDER --context 4096 --concurrency 200 --dense h100 --attention h20 --tpot 60
    """
    shape = _shape(model, dtype)
    catalogue = hardware.load(str(hardware_file) if hardware_file else None)
    hardware.require((dense, attention), catalogue)
    arena_bytes = _arena_bytes(arena, catalogue[attention].memory_bytes)
    machines = Machines(
        catalogue[dense].speed, catalogue[attention].speed, arena_bytes, AutoscalerPolicy().pool_share
    )
    need = Need(context, concurrency, tpot / 1000 if tpot else None)
    found = size(shape, need, machines)
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"arena_bytes": arena_bytes}, indent=2))
        return
    console = Console()
    for line in _lines(shape, found, need, arena_bytes):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    devices = {"dense": catalogue[dense].device, "attention": catalogue[attention].device}
    print(yaml.safe_dump(_values(shape, found, arena_bytes, dtype, devices), sort_keys=False), end="")


def _shape(model: str, dtype: DTypeName) -> ModelShape:
    try:
        name = str(resolve_fetched(model))
    except ModelError:  # not fetched: a shape's name, or a folder that need not hold weights
        name = model
    shape = models.resolve(name).shape
    factor = _BYTES[dtype] / shape.element_bytes
    return replace(shape, weight_bytes=shape.weight_bytes * factor, element_bytes=_BYTES[dtype])


def _arena_bytes(arena: str | None, memory_bytes: float) -> int:
    if arena is None:
        return int(memory_bytes * _ARENA_SHARE) // _MIB * _MIB
    try:
        found = parse_bytes(arena)
    except ValueError as error:
        raise InvalidRequest(f"--arena: {error}") from error
    assert isinstance(found, int)
    if found > memory_bytes:
        raise InvalidRequest(f"--arena {arena}: the device has {memory_bytes / 2**30:.0f} GiB")
    return found


def _lines(shape: ModelShape, found: Size, need: Need, arena_bytes: int) -> tuple[str, ...]:
    weights_gib, cache_gib = shape.weight_bytes / 2**30, found.cache_bytes / 2**30
    arena_gib, pod_gib = arena_bytes / 2**30, (arena_bytes + _MARGIN_BYTES) / 2**30
    dense_gib = (shape.weight_bytes + _DENSE_MARGIN_BYTES) / 2**30
    return (
        f"weights            {weights_gib:,.2f} GiB in each dense worker",
        f"KV cache           {shape.kv_token_bytes / 1024:,.1f} KiB a token, {cache_gib:,.2f} GiB in all",
        f"attention workers  {found.attention_workers} of {arena_gib:,.1f} GiB ({pod_gib:,.1f} in all)",
        f"dense workers      {found.dense_workers} of {dense_gib:,.1f} GiB",
        f"a token            at least {found.step_s * 1000:,.1f} ms with all {need.concurrency} at work, "
        f"most of it {found.bottleneck}",
        f"the pool holds     {found.held} such sequences",
        "",
        "# values for deploy/helm/anabranch",
    )


def _values(
    shape: ModelShape, found: Size, arena_bytes: int, dtype: DTypeName, devices: Mapping[str, str]
) -> dict[str, object]:
    memory = f"{-(-int(shape.weight_bytes + _DENSE_MARGIN_BYTES) // _MIB)}Mi"
    dense = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    return {
        "model": {"dtype": dtype},
        "dense": {"replicas": found.dense_workers, "device": devices["dense"], "resources": dense},
        "attention": {
            "replicas": found.attention_workers,
            "device": devices["attention"],
            "arena": f"{arena_bytes // _MIB}MiB",
        },
    }
