"""`anabranch bench serve`: whole batches through our engine and through peers, in turn on the same cores."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from anabranch.cli.bench.contender import Cell, Contender, Served, own_command
from anabranch.cli.bench.records import Results, figure, ratio
from cluster.errors import InvalidRequest, Unavailable

CELLS = (
    Cell(1, 128),
    Cell(8, 128),
    Cell(32, 128),
    Cell(8, 1024),
    Cell(4, 4096),
    Cell(1, 8000),
)
_LEAST_VS_VLLM = {(4, 4096): 1.3, (1, 8000): 1.3}
"""Where attention reads long caches we ask more of ourselves; elsewhere at least as much as vLLM gives."""

_PEERS = Path(__file__).parent / "peers"
_ARENA_BYTES = 4 * 2**30
_SWEEP_CELLS = (Cell(8, 128), Cell(4, 4096))
_VLLM_SWEEP: tuple[dict[str, Any], ...] = (
    {"enforce_eager": True, "max_num_batched_tokens": 2048},
    {"enforce_eager": True, "max_num_batched_tokens": 8192},
    {"enforce_eager": False, "max_num_batched_tokens": 2048},
)


@dataclass(frozen=True, slots=True)
class ServeBench:
    """What is served by whom. peers_python: the interpreter of `make bench-peers`; None: by us alone."""

    model: str
    dtype: str
    threads: int
    step_tokens: int
    repeats: int
    cells: tuple[Cell, ...] = CELLS
    peers_python: str | None = None


def cell_of(text: str) -> Cell:
    """`8x128` as a cell. Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if match is None:
        raise InvalidRequest(f"{text!r} is no cell; BATCHxPROMPT such as 8x128 is expected")
    return Cell(int(match[1]), int(match[2]))


def measure(bench: ServeBench) -> Results:
    """`serve`: per cell tokens per second of decoding (from each round's median step) and of prefill, ours
    and as ratios to each peer's. Raises Unavailable when a contender does not come up.
    """
    with _contenders(bench) as contenders:
        return {"serve": [_cell(cell, contenders, bench.repeats) for cell in bench.cells]}


def _cell(cell: Cell, contenders: Mapping[str, Contender], repeats: int) -> Results:
    served = rounds(cell, contenders, repeats)
    settings = {name: contender.settings for name, contender in contenders.items()}
    found: Results = {"batch": cell.batch, "prompt": cell.prompt, "mode": "monolithic"}
    for name, kind in (("decode_tok_s", "decode"), ("prefill_tok_s", "prefill")):
        own = [getattr(one, kind) for one in served["anabranch"]]
        found[name] = figure(own, "tok/s", settings=settings["anabranch"])
        prefix = "prefill_" if kind == "prefill" else ""
        for peer in contenders.keys() - {"anabranch"}:
            asked = _LEAST_VS_VLLM.get((cell.batch, cell.prompt), 1.0) if kind == "decode" else 1.0
            found[f"{prefix}vs_{peer}"] = ratio(
                ("anabranch", own),
                (peer, [getattr(one, kind) for one in served[peer]]),
                "tok/s",
                at_least=asked if peer == "vllm_cpu" else None,
                settings={"anabranch": settings["anabranch"], peer: settings[peer]},
            )
    return found


def rounds(cell: Cell, contenders: Mapping[str, Contender], repeats: int) -> dict[str, list[Served]]:
    """`repeats` rounds of a cell by each contender in turn, after one that is thrown away."""
    served: dict[str, list[Served]] = {name: [] for name in contenders}
    order = list(contenders)
    for number in range(1 + repeats):
        for name in order:
            one = contenders[name].serve(cell, seed=number)
            if number > 0:
                served[name].append(one)
        order.reverse()
    return served


@contextlib.contextmanager
def _contenders(bench: ServeBench) -> Iterator[dict[str, Contender]]:
    common = {"model": bench.model, "dtype": bench.dtype, "threads": bench.threads}
    with contextlib.ExitStack() as stack:

        def start(
            name: str, command: Sequence[str], settings: dict[str, Any], **environment: str
        ) -> Contender:
            return stack.enter_context(
                contextlib.closing(Contender(name, command, common | settings, environment))
            )

        own = {"arena_bytes": _ARENA_BYTES, "step_tokens": bench.step_tokens}
        found = {"anabranch": start("anabranch", own_command(), own)}
        if bench.peers_python is not None:
            if not Path(bench.peers_python).exists():
                raise Unavailable(f"{bench.peers_python} is not there: `make bench-peers` makes it")
            command = [bench.peers_python, str(_PEERS / "transformers_cpu.py")]
            found["transformers"] = start("transformers", command, {})
            found["vllm_cpu"] = _best_vllm(bench, start)
        yield found


def _best_vllm(bench: ServeBench, start: Any) -> Contender:
    """vLLM under the settings that serve the sweep's cells fastest; the sweep is kept in its settings."""
    assert bench.peers_python is not None
    command = [bench.peers_python, str(_PEERS / "vllm_cpu.py")]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{bench.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(_ARENA_BYTES // 2**30),
    }
    candidates: list[tuple[float, Contender]] = []
    for settings in _VLLM_SWEEP:
        contender = start("vllm_cpu", command, {"max_model_len": 8192} | settings, **environment)
        speeds = [
            median(one.decode for one in rounds(cell, {"it": contender}, 1)["it"]) for cell in _SWEEP_CELLS
        ]
        candidates.append((prod(speeds), contender))
    sweep = [
        {**settings, "score": score} for settings, (score, _) in zip(_VLLM_SWEEP, candidates, strict=True)
    ]
    _, best = max(candidates, key=_score)
    for _, contender in candidates:
        if contender is not best:
            contender.close()
    best.settings |= {"environment": environment, "sweep": sweep}
    return best


def _score(candidate: tuple[float, Contender]) -> float:
    return candidate[0]
