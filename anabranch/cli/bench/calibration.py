"""The parts of a step on this machine, each in processes on own cores, for `anabranch loadgen check`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.cli.bench import calibration_attention, calibration_dense, calibration_turns, step_attention
from anabranch.cli.bench.children import next_line, start
from anabranch.cli.bench.step_settings import StepSettings
from cluster.errors import ConfigError
from loadgen.simulation.calibration import Calibration, Lanes

_ARENA_BYTES = 4 * 2**30
"""All that is filled for the calibration; pages are touched only when used."""


def measure(model: Path, dtype: str, lanes: Collection[Lanes], *, shares_core: bool = False) -> Calibration:
    """Some minute: dense work, attention over these `lanes`, and what asking takes of a core that dense
    workers share. Nobody is told of tokens. Raises ConfigError on one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("a calibration needs two cores: one for each side")
    alone = StepSettings(
        str(model), (cores[0],), dtype=_checked(dtype), prefix_sharing=False, arena_bytes=_ARENA_BYTES
    )
    split = replace(alone, attention_cores=(cores[1],))
    told: dict[str, Any] = _ask(calibration_dense.__name__, alone)
    told["attend"] = {
        each: _ask(calibration_attention.__name__, alone)
        if each == "local"
        else _remote(replace(split, spins=each == "remote"))
        for each in lanes
    }
    told["turns"] = _turns(replace(split, spins=False)) if shares_core else []
    return Calibration.of(told | {"served": [], "passed_on": []})


def _remote(settings: StepSettings) -> Any:
    with contextlib.ExitStack() as stack:
        _, port = start(stack, step_attention.__name__, settings)
        return _ask(calibration_attention.__name__, replace(settings, attention_port=int(port)))


def _turns(settings: StepSettings) -> Any:
    """What two take of their core for asking, without what one takes to read its weights."""
    with contextlib.ExitStack() as stack:
        _, port = start(stack, step_attention.__name__, settings)
        told = replace(settings, attention_port=int(port))
        workers = [start(stack, calibration_turns.__name__, told)[0] for _ in range(2)]
        reading_s = float(_say(workers[:1], calibration_turns.READ)[0])
        first, second = _say(workers, calibration_turns.ASK)
    return [(rows, (a + b) / 2 - reading_s) for (rows, a), (_, b) in zip(first, second, strict=True)]


def _say(workers: Sequence[subprocess.Popen[str]], word: str) -> list[Any]:
    """To all at once; their answers."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{word}\n")
        worker.stdin.flush()
    return [json.loads(next_line(worker)) for worker in workers]


def _ask(module: str, settings: StepSettings) -> Any:
    with contextlib.ExitStack() as stack:
        return json.loads(start(stack, module, settings)[1])


def _checked(dtype: str) -> Any:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {dtype!r}: float32, bfloat16 or float16")
    return dtype
