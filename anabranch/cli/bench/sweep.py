"""A peer under its best settings: each candidate serves the same cells, and all their scores are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from anabranch.cli.bench.contender import Cell, Contender, Served

SWEEP_CELLS = (Cell(8, 128), Cell(4, 2048))
"""One that matrix products rule, one that attention does."""

_SWEEP_ROUNDS = 2
"""Of each cell, whose best counts: settings are not chosen by who had the machine to himself."""

_VLLM_MODEL_TOKENS = 8192
_VLLM_CACHE_GIB = 1
_VLLM_BASE: dict[str, Any] = {
    "max_model_len": _VLLM_MODEL_TOKENS,
    "enforce_eager": True,
    "max_num_batched_tokens": 2048,
    "block_size": 128,
}
_VLLM_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"max_num_batched_tokens": 8192},
    {"block_size": 32},
    {"enforce_eager": False},
)
"""Chunked prefill's budget, the cache's blocks, compiled or eager, and threads (`peer_candidates`)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a contender."""

    name: str
    command: Sequence[str]
    settings: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def told(self) -> dict[str, Any]:
        """What tells it from others, for the record."""
        return {**self.settings, **({"environment": self.environment} if self.environment else {})}


def peer_candidates(python: str, programs: Path, threads: int) -> dict[str, list[Candidate]]:
    """Each peer's, by name; with fewer threads than all as well, since more are not always faster."""
    counts = sorted({threads, max(1, threads // 2)}, reverse=True)
    transformers = [python, str(programs / "transformers_cpu.py")]
    vllm = [python, str(programs / "vllm_cpu.py")]
    tried = [(threads, change) for change in _VLLM_CHANGES] + [(count, {}) for count in counts[1:]]
    return {
        "transformers": [Candidate("transformers", transformers, {"threads": count}) for count in counts],
        "vllm_cpu": [
            Candidate("vllm_cpu", vllm, _VLLM_BASE | change | {"threads": count}, _vllm_environment(count))
            for count, change in tried
        ],
    }


@dataclass(frozen=True, slots=True)
class Trial:
    """How candidates are started and compared."""

    start: Callable[[Candidate], Contender]
    cells: tuple[Cell, ...]
    rounds: Callable[[Cell, Mapping[str, Contender], int], dict[str, list[Served]]]
    say: Callable[[str], None]

    def best(self, candidates: Sequence[Candidate]) -> Contender:
        """The one whose product of decode and prefill rates over the cells is greatest, still running, each
        the best of some rounds; the others are closed, two at most run at a time, and the sweep is kept in
        the winner's settings.
        """
        best: Contender | None = None
        best_score = 0.0
        sweep = []
        for candidate in candidates:
            contender = self.start(candidate)
            score = self._score(contender)
            sweep.append({**candidate.told, "score": score})
            self.say(f"  {candidate.name} {candidate.told}: score {score:.4g}")
            if best is None or score > best_score:
                best, contender, best_score = contender, best or contender, score
            if contender is not best:
                contender.close()
        assert best is not None, "a sweep needs a candidate"
        best.settings |= {
            "sweep": sweep,
            "sweep_cells": [f"{cell.batch}x{cell.prompt}" for cell in self.cells],
        }
        return best

    def _score(self, contender: Contender) -> float:
        only = {contender.name: contender}
        served = [self.rounds(cell, only, _SWEEP_ROUNDS)[contender.name] for cell in self.cells]
        return prod(max(one.decode for one in each) * max(one.prefill for one in each) for each in served)


def _vllm_environment(threads: int) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_CPU_KVCACHE_SPACE": str(_VLLM_CACHE_GIB),
    }
