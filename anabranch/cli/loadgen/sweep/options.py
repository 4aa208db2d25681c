"""The options that all kinds of `anabranch loadgen sweep` have, each with its help, and what they mean."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.loadgen.concurrency import numbers, rates
from cluster.errors import InvalidRequest
from loadgen.metrics import Objectives
from loadgen.sweep.load import LoadKind, Standard
from loadgen.sweep.space import Dimension, parse
from loadgen.sweep.sweep import Loads

_LOADS, _SPACE, _JUDGE = "Loads", "Clusters and settings", "Judgement"

Rates = Annotated[
    str,
    typer.Option(
        metavar="R[,R...]", help="Open loop: sessions a second, a point each.", rich_help_panel=_LOADS
    ),
]
Concurrency = Annotated[
    str,
    typer.Option(metavar="N[,N...]", help="Closed loop: users, a point each.", rich_help_panel=_LOADS),
]
Saturate = Annotated[
    LoadKind | None,
    typer.Option(
        help="Find the highest load that is borne: doubled until it is not, then by bisection. Without "
        "--rates and --concurrency: rate.",
        rich_help_panel=_LOADS,
    ),
]
From = Annotated[
    float,
    typer.Option("--from", help="Load with which --saturate begins.", min=1e-6, rich_help_panel=_LOADS),
]
Precision = Annotated[
    float,
    typer.Option(
        help="Share by which the highest load borne may be off.", min=0.001, max=1.0, rich_help_panel=_LOADS
    ),
]
Attain = Annotated[
    float,
    typer.Option(
        help="Share of the requests that must keep --slo. In any case at most 5 % may fail or, of an open "
        "loop, pile up; without --slo more users must bring at least 5 % more tokens.",
        rich_help_panel=_JUDGE,
    ),
]
Maximise = Annotated[
    str,
    typer.Option(
        metavar="KEY",
        help="Figure that points are compared by. Default: tokens per dollar or, without prices, per second; "
        "with --slo those of requests that keep it.",
        rich_help_panel=_JUDGE,
    ),
]
Vary = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B|LOW..HIGH",
        help="A key of the configuration and its values: dense.step_tokens=512,2048, each with each of the "
        "other keys'; or a range, for --search. Repeatable.",
        rich_help_panel=_SPACE,
    ),
]
Search = Annotated[
    int | None,
    typer.Option(
        metavar="TRIALS",
        help="Instead of every combination, as many as this, drawn by what came of earlier ones (Optuna).",
        min=1,
        rich_help_panel=_SPACE,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="New folder for points.jsonl and report.html; default: sweep-DATE-TIME.",
        rich_help_panel=_JUDGE,
    ),
]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a sweep goes through, and how it judges."""

    loads: Loads
    standard: Standard
    dimensions: tuple[Dimension, ...]
    trials: int | None
    seed: int
    folder: Path


def wishes(
    load: tuple[str, str, LoadKind | None, float, float],
    judgement: tuple[str, float, str],
    seed: int,
    out: Path | None,
    vary: Sequence[str] | None = None,
    trials: int | None = None,
) -> Wishes:
    """`load`: --rates, --concurrency, --saturate, --from and --precision; `judgement`: --slo, --attain and
    --maximise. Raises InvalidRequest for what does not go together.
    """
    slo, attain, maximise = judgement
    return Wishes(
        _loads(*load),
        Standard(Objectives.parse(slo), attained=attain, maximise=maximise),
        _dimensions(vary, trials),
        trials,
        seed,
        out or Path(time.strftime("sweep-%Y%m%d-%H%M%S")),
    )


def _loads(
    rate_list: str, concurrency: str, saturate: LoadKind | None, first: float, precision: float
) -> Loads:
    """Raises InvalidRequest where it is not one of the three ways."""
    if sum(map(bool, (rate_list, concurrency, saturate))) > 1:
        raise InvalidRequest("give one of --rates, --concurrency and --saturate")
    if rate_list:
        return Loads(LoadKind.RATE, rates(rate_list))
    if concurrency:
        return Loads(LoadKind.CONCURRENCY, tuple(map(float, numbers(concurrency))))
    return Loads(saturate or LoadKind.RATE, (first,), searches=True, precision=precision)


def _dimensions(vary: Sequence[str] | None, search: int | None) -> tuple[Dimension, ...]:
    """Raises InvalidRequest for a search of nothing, or a key that is named twice."""
    found = tuple(map(parse, vary or ()))
    if search is not None and not found:
        raise InvalidRequest("--search needs a space: --vary dense.step_tokens=256..8192")
    if len({dimension.key for dimension in found}) < len(found):
        raise InvalidRequest("--vary names a key twice: give all its values at once")
    return found
