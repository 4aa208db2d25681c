"""Which shape to buy: all shapes of a catalogue in closed form, the best of each way, and a verdict. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue, HardwareClass
from loadgen.metrics import Objectives
from loadgen.simulation.capacity import Point, Setting, best_within, bottleneck, saturated
from loadgen.simulation.machines import Shape, Side

DENSE_DEVICES = (1, 2, 4, 8)
ATTENTION_DEVICES = (1, 2, 3, 4, 6, 8, 12, 16)


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
    break_even: float | None
    """Price of an attention device, in prices of a dense device, at which tokens per dollar of both are
    equal; 0 or less: at no price. None where one way cannot serve.
    """
    verdict: str


def advise(catalogue: Catalogue, setting: Setting, objectives: Objectives, shown: int) -> Advice:
    """Search (a, b) over all kinds. Raises InvalidRequest where no shape can serve within the objectives."""
    kinds = tuple(catalogue.values())
    alone = _best(_homogeneous(kinds), setting, objectives, shown)
    split = _best(_disaggregated(kinds), setting, objectives, shown)
    if not alone and not split:
        raise InvalidRequest(
            f"no shape of up to {DENSE_DEVICES[-1]} + {ATTENTION_DEVICES[-1]} devices serves "
            f"{setting.model.name} within these objectives: loosen --slo, or name other --kinds"
        )
    should = bool(split) and (not alone or split[0].chosen.usd_per_mtok < alone[0].chosen.usd_per_mtok)
    even = break_even(split[0], alone[0]) if alone and split else None
    return Advice(alone, split, should, even, _verdict(alone, split, should, even))


def break_even(split: Candidate, alone: Candidate) -> float:
    """See `Advice`: T_s / (a p + b r p) = T_h / price_h, solved for r."""
    attention = split.shape.attention
    assert attention is not None, "a split shape has attention workers"
    dense = split.shape.dense
    gain = split.chosen.tokens_per_s / alone.chosen.tokens_per_s
    left_usd = gain * alone.shape.price_per_hour_usd - split.shape.dense_workers * dense.price_per_hour_usd
    return left_usd / (attention.devices * dense.kind.price_per_hour_usd)


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


def _best(
    shapes: Iterator[Shape], setting: Setting, objectives: Objectives, shown: int
) -> tuple[Candidate, ...]:
    """The cheapest per output token of those that can keep the objectives."""
    found: list[tuple[float, str, Shape, Point, Point]] = []
    for shape in shapes:
        most = saturated(shape, setting)
        within = best_within(shape, setting, objectives) if most is not None else None
        if most is not None and within is not None:
            found.append((within.usd_per_mtok, str(shape), shape, most, within))
    cheapest = sorted(found, key=lambda item: item[:2])[:shown]
    return tuple(
        Candidate(shape, most, within if objectives.bounds_ms else None, bottleneck(shape, setting))
        for _, _, shape, most, within in cheapest
    )


def _verdict(alone: Sequence[Candidate], split: Sequence[Candidate], should: bool, even: float | None) -> str:
    if not split:
        return f"do not disaggregate: no split shape serves this; take {alone[0].shape}"
    if not alone or even is None:
        return f"disaggregate: only split shapes serve this; take {split[0].shape}"
    best, other = (split[0], alone[0]) if should else (alone[0], split[0])
    attention, dense = split[0].shape.attention, split[0].shape.dense
    assert attention is not None, "a split shape has attention workers"
    ratio = attention.kind.price_per_hour_usd / dense.kind.price_per_hour_usd
    when = (
        f"tokens per dollar are equal where a {attention.kind.name} costs {even:.2f} of a {dense.kind.name} "
        f"(now {ratio:.2f})"
        if even > 0
        else f"no price of a {attention.kind.name} makes them equal"
    )
    words = "disaggregate" if should else "do not disaggregate"
    return (
        f"{words}: {best.shape} makes a million output tokens for ${best.chosen.usd_per_mtok:.3f}, "
        f"{other.shape} for ${other.chosen.usd_per_mtok:.3f}; {when}"
    )
