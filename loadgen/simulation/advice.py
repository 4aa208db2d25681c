"""Which shape to buy: all shapes of a catalogue in closed form, the best of each way, and a verdict. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue, HardwareClass
from loadgen.metrics import Objectives
from loadgen.simulation.capacity import Point, Setting, best_within, bottleneck, saturated
from loadgen.simulation.machines import Shape, Side

DENSE_DEVICES = (1, 2, 4, 8)
ATTENTION_DEVICES = (1, 2, 3, 4, 6, 8, 12, 16)

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape at saturation and, where one keeps the objectives, at its largest such batch."""

    shape: Shape
    saturated: Point
    within: Point | None
    bottleneck: str

    @property
    def chosen(self) -> Point:
        """What it is ranked by."""
        return self.within or self.saturated


@dataclass(frozen=True, slots=True)
class Advice:
    """The best shapes of both ways, the cheapest per token first; and what follows."""

    homogeneous: tuple[Candidate, ...]
    disaggregated: tuple[Candidate, ...]
    should_disaggregate: bool
    break_even_usd: tuple[float, ...]
    """Prices per hour of the best split shape's attention devices, lowest first, at which the cheapest shape
    of either way makes tokens for the same money; what else there is costs what it does now.
    """
    verdict: str


@dataclass(frozen=True, slots=True)
class _Served:
    """A shape that can keep the objectives, and its largest batch that does."""

    shape: Shape
    best: Point


def advise(catalogue: Catalogue, setting: Setting, objectives: Objectives, shown: int) -> Advice:
    """Search (a, b) over all kinds. Raises InvalidRequest where no shape can serve within the objectives."""
    kinds = tuple(catalogue.values())
    alone = _served(_homogeneous(kinds), setting, objectives)
    split = _served(_disaggregated(kinds), setting, objectives)
    if not alone and not split:
        raise InvalidRequest(
            f"no shape of up to {DENSE_DEVICES[-1]} + {ATTENTION_DEVICES[-1]} devices serves "
            f"{setting.model.name} within these objectives: loosen --slo, or name other --kinds"
        )
    should = bool(split) and (not alone or split[0].best.usd_per_mtok < alone[0].best.usd_per_mtok)
    even = _break_even_usd(split, alone)
    return Advice(
        _candidates(alone[:shown], setting, objectives),
        _candidates(split[:shown], setting, objectives),
        should,
        even,
        _verdict(alone, split, should, even),
    )


def _break_even_usd(split: Sequence[_Served], alone: Sequence[_Served]) -> tuple[float, ...]:
    """See `Advice`. With T tokens per second, N devices of the kind at x, and F for all others, a shape's
    tokens cost (F + N x) / T: a line over x. Where the lowest lines of both ways cross, neither is cheaper.
    """
    if not split or not alone:
        return ()
    attention = split[0].shape.attention
    assert attention is not None, "a split shape has attention workers"
    ours, theirs = (_lowest_lines(served, attention.kind) for served in (split, alone))
    met = set()
    for (fixed, slope), (other_fixed, other_slope) in itertools.product(ours, theirs):
        if slope == other_slope:
            continue
        usd = (other_fixed - fixed) / (slope - other_slope)
        lowest = min(each_fixed + each_slope * usd for each_fixed, each_slope in (*ours, *theirs))
        if usd > 0 and fixed + slope * usd <= lowest * (1 + _ROUNDING):
            met.add(usd)
    return tuple(sorted(met))


def _lowest_lines(served: Sequence[_Served], kind: HardwareClass) -> list[tuple[float, float]]:
    """(F / T, N / T) of the shapes that are the cheapest of all at some price."""
    lines = []
    for each in served:
        sides = ((each.shape.dense, each.shape.dense_workers), (each.shape.attention, 1))
        devices = sum(
            side.devices * workers for side, workers in sides if side and side.kind.name == kind.name
        )
        fixed_usd = each.shape.price_per_hour_usd - devices * kind.price_per_hour_usd
        lines.append((max(0.0, fixed_usd) / each.best.tokens_per_s, devices / each.best.tokens_per_s))
    lowest: list[tuple[float, float]] = []
    for line in sorted(lines):
        if not lowest or line[1] < lowest[-1][1]:
            lowest.append(line)
    return lowest


def _homogeneous(kinds: Sequence[HardwareClass]) -> Iterator[Shape]:
    for kind in kinds:
        for devices in DENSE_DEVICES:
            yield Shape(Side(kind, devices))


def _disaggregated(kinds: Sequence[HardwareClass]) -> Iterator[Shape]:
    networked = [kind for kind in kinds if kind.network_bytes_per_s is not None]
    for dense in networked:
        for devices in DENSE_DEVICES:
            for attention in networked:
                for workers in ATTENTION_DEVICES:
                    yield Shape(Side(dense, devices), Side(attention, workers))


def _served(shapes: Iterator[Shape], setting: Setting, objectives: Objectives) -> list[_Served]:
    """Those that can keep the objectives, the cheapest per output token first."""
    points = ((shape, best_within(shape, setting, objectives)) for shape in shapes)
    found = [_Served(shape, point) for shape, point in points if point is not None]
    return sorted(found, key=lambda served: (served.best.usd_per_mtok, str(served.shape)))


def _candidates(served: Sequence[_Served], setting: Setting, objectives: Objectives) -> tuple[Candidate, ...]:
    candidates = []
    for shape, best in ((each.shape, each.best) for each in served):
        most = saturated(shape, setting)
        assert most is not None, "what keeps objectives can serve"
        limit = bottleneck(shape, setting, objectives)
        candidates.append(Candidate(shape, most, best if objectives.bounds_ms else None, limit))
    return tuple(candidates)


def _verdict(alone: Sequence[_Served], split: Sequence[_Served], should: bool, even: Sequence[float]) -> str:
    if not split:
        return f"do not disaggregate: no split shape serves this; take {alone[0].shape}"
    if not alone:
        return f"disaggregate: only split shapes serve this; take {split[0].shape}"
    best, other = (split[0], alone[0]) if should else (alone[0], split[0])
    words = "disaggregate" if should else "do not disaggregate"
    return (
        f"{words}: {best.shape} makes a million output tokens for ${best.best.usd_per_mtok:.3f}, "
        f"{other.shape} for ${other.best.usd_per_mtok:.3f}; {_when(split[0].shape, even)}"
    )


def _when(split: Shape, even: Sequence[float]) -> str:
    """At which price the other way would be as good: beside that of a dense device, where that is another."""
    assert split.attention is not None, "a split shape has attention workers"
    kind, dense = split.attention.kind, split.dense.kind
    if not even:
        return f"no price of a {kind.name} makes tokens per dollar equal"
    if kind.name == dense.name:
        prices = " or ".join(f"${usd:.2f}" for usd in even)
        now = f"${kind.price_per_hour_usd:.2f}"
        return f"tokens per dollar are equal where a {kind.name} costs {prices} an hour (now {now})"
    ratios = " or ".join(f"{usd / dense.price_per_hour_usd:.2f}" for usd in even)
    ratio = kind.price_per_hour_usd / dense.price_per_hour_usd
    return (
        f"tokens per dollar are equal where a {kind.name} costs {ratios} of a {dense.name} (now {ratio:.2f})"
    )
