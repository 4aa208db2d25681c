"""`anabranch bench serve`: whole batches through our engine and through peers, in turn on the same cores."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anabranch.cli.bench.contender import Cell, Contender, Served, own_command
from anabranch.cli.bench.floors import Floors
from anabranch.cli.bench.records import Results, figure, ratio
from anabranch.cli.bench.sweep import SWEEP_CELLS, Candidate, Trial, peer_candidates
from cluster.errors import InvalidRequest, Unavailable

CELLS = (
    Cell(1, 128),
    Cell(8, 128),
    Cell(32, 128),
    Cell(8, 1024),
    Cell(4, 4096),
    Cell(1, 8000),
)
SPLIT_CELLS = (Cell(1, 128), Cell(8, 128), Cell(8, 1024), Cell(4, 4096))
"""Those that one core for dense work and one for attention serve as well, in the same rounds."""

_LEAST_VS_VLLM = {(4, 4096): 1.3, (1, 8000): 1.3}
"""Where attention reads long caches we ask more of ourselves; elsewhere at least as much as vLLM gives."""

_OWN = "anabranch"
_OWN_SPLIT = "anabranch_split"
_PEERS = Path(__file__).parent / "peers"
_ARENA_BYTES = 2**30
_WARM_UP_PROMPT_MOST = 256
_WARM_UP_STEPS = 4

Say = Callable[[str], None]


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
    sweep_cells: tuple[Cell, ...] = SWEEP_CELLS


def cell_of(text: str) -> Cell:
    """`8x128` as a cell. Raises InvalidRequest."""
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    if match is None:
        raise InvalidRequest(f"{text!r} is no cell; BATCHxPROMPT such as 8x128 is expected")
    return Cell(int(match[1]), int(match[2]))


def measure(bench: ServeBench, say: Say) -> Results:
    """`serve`: per cell and mode tokens per second of decoding (from each round's median step) and of
    prefill, ours and as ratios to each peer's. `say` hears of each round. Raises Unavailable when
    a contender does not come up.
    """
    say("measuring memory and matrix products for the floors")
    floors = Floors.measure(Path(bench.model), bench.dtype, bench.threads)
    found: list[Results] = []
    with _contenders(bench, say) as contenders:
        for number, cell in enumerate(bench.cells):
            chosen = {
                name: contender
                for name, contender in contenders.items()
                if name != _OWN_SPLIT or cell in SPLIT_CELLS
            }
            say(f"cell {number + 1} of {len(bench.cells)}: {cell.batch}x{cell.prompt}")
            served = rounds(cell, chosen, bench.repeats, say)
            settings = {name: contender.settings for name, contender in chosen.items()}
            found += [
                _row(cell, own, served, settings, floors) for own in (_OWN, _OWN_SPLIT) if own in served
            ]
    return {"serve": found}


def _row(
    cell: Cell,
    own: str,
    served: Mapping[str, list[Served]],
    settings: Mapping[str, dict[str, Any]],
    floors: Floors,
) -> Results:
    """One mode of ours in one cell, beside every peer."""
    mode = "monolithic" if own == _OWN else "disaggregated"
    found: Results = {"batch": cell.batch, "prompt": cell.prompt, "mode": mode}
    limits = {
        "decode": floors.decode_rate(cell.batch, cell.prompt, mode),
        "prefill": floors.prefill_rate(mode),
    }
    for kind, limit in limits.items():
        ours = [getattr(one, kind) for one in served[own]]
        found[f"{kind}_tok_s"] = figure(ours, "tok/s", floor=limit, settings=settings[own])
        prefix = "prefill_" if kind == "prefill" else ""
        for peer in (name for name in served if name not in (_OWN, _OWN_SPLIT)):
            asked = _LEAST_VS_VLLM.get((cell.batch, cell.prompt), 1.0) if kind == "decode" else 1.0
            found[f"{prefix}vs_{peer}"] = ratio(
                (own, ours),
                (peer, [getattr(one, kind) for one in served[peer]]),
                "tok/s",
                at_least=asked if peer == "vllm_cpu" and own == _OWN else None,
                settings={own: settings[own], peer: settings[peer]},
            )
    return found


def rounds(
    cell: Cell, contenders: Mapping[str, Contender], repeats: int, say: Say
) -> dict[str, list[Served]]:
    """`repeats` rounds of a cell by each contender in turn, after a short one that is thrown away."""
    served: dict[str, list[Served]] = {name: [] for name in contenders}
    warm_up = Cell(cell.batch, min(cell.prompt, _WARM_UP_PROMPT_MOST), _WARM_UP_STEPS)
    order = list(contenders)
    for name in order:
        contenders[name].work(warm_up, seed=0)
    for number in range(1, 1 + repeats):
        order.reverse()
        for name in order:
            one = contenders[name].serve(cell, seed=number)
            served[name].append(one)
            pace = f"decode {one.decode:.1f}, prefill {one.prefill:.0f} tok/s"
            say(f"  {cell.batch}x{cell.prompt} round {number} of {repeats}: {name}: {pace}")
    return served


@contextlib.contextmanager
def _contenders(bench: ServeBench, say: Say) -> Iterator[dict[str, Contender]]:
    """All of them, started one after the other."""
    common = {"model": bench.model, "dtype": bench.dtype, "threads": bench.threads}
    with contextlib.ExitStack() as stack:

        def start(candidate: Candidate) -> Contender:
            say(f"starting {candidate.name} {candidate.settings or ''}")
            settings = common | candidate.settings
            contender = Contender(candidate.name, candidate.command, settings, candidate.environment)
            return stack.enter_context(contextlib.closing(contender))

        own = {"arena_bytes": _ARENA_BYTES, "step_tokens": bench.step_tokens}
        found = {_OWN: start(Candidate(_OWN, own_command(), own | {"mode": "monolithic"}))}
        if len(os.sched_getaffinity(0)) > 1 and set(bench.cells) & set(SPLIT_CELLS):
            found[_OWN_SPLIT] = start(Candidate(_OWN_SPLIT, own_command(), own | {"mode": "disaggregated"}))
        if bench.peers_python is not None:
            if not Path(bench.peers_python).exists():
                raise Unavailable(f"{bench.peers_python} is not there: `make bench-peers` makes it")
            trial = Trial(start, bench.sweep_cells, partial(rounds, say=say), say)
            for name, candidates in peer_candidates(bench.peers_python, _PEERS, bench.threads).items():
                found[name] = trial.best(candidates)
        yield found
