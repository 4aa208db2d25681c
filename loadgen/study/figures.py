"""What came of a study: figures over seeds with their intervals, gains, and how far ways agree. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loadgen.metrics import Summary
from loadgen.study.study import Study, Way

FIGURES = (
    "output_throughput",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "usd_per_mtok",
    "joules_per_output_token",
)
"""What is told of each run, by its key in a summary."""

COMPARED = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
"""What two ways should agree on."""

WITHIN = 0.1
"""How far a simulation may be off what was measured of the same."""

_T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t for 95 % by degrees of freedom, from 1 on (two sides); beyond: the normal distribution's."""
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds. `half_width` of its 95 % interval (Student's t); None of one seed."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value."""
        mean, freedom = statistics.fmean(values), len(values) - 1
        if not freedom:
            return cls(mean, None)
        t = _T_95[freedom - 1] if freedom <= len(_T_95) else _NORMAL_95
        return cls(mean, t * statistics.stdev(values) / len(values) ** 0.5)


@dataclass(frozen=True, slots=True)
class Runs:
    """One case in one way: summaries by seed, in the order of the study's seeds. `notes`: what makes them
    doubtful, such as late calls of an emulation.
    """

    part: str
    case: str
    way: Way
    summaries: tuple[Summary, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.part}: {self.case}, {self.way}"

    @property
    def doubts(self) -> tuple[str, ...]:
        """Its notes, and how many requests failed: latencies are of the others alone."""
        failed = sum(summary["failed"] for summary in self.summaries)
        asked = sum(summary["num_prompts"] for summary in self.summaries)
        return (*self.notes, f"{failed} of {asked} requests failed") if failed else self.notes

    def values(self, key: str) -> list[float]:
        """A figure by seed; empty where some run has none."""
        found = [summary.get(key) for summary in self.summaries]
        return [value for value in found if value is not None] if None not in found else []

    def estimate(self, key: str) -> Estimate | None:
        """None where some run has no such figure."""
        values = self.values(key)
        return Estimate.of(values) if values else None


@dataclass(frozen=True, slots=True)
class StudyResults:
    """All runs of a study."""

    study: Study
    runs: tuple[Runs, ...]

    def of(self, part: str, case: str, way: Way) -> Runs | None:
        """The runs of a case in a way; None where they were not made."""
        for runs in self.runs:
            if (runs.part, runs.case, runs.way) == (part, case, way):
                return runs
        return None

    def gain(self, runs: Runs) -> Estimate | None:
        """Throughput over that of its part's first case, in the same way and under the same seeds, - 1. None
        of the first case itself, and where some run of either brought nothing.
        """
        (cases,) = (part.case for part in self.study.part if part.title == runs.part)
        base = self.of(runs.part, cases[0].name, runs.way)
        if base is None or base is runs:
            return None
        key = "output_throughput"
        others, firsts = runs.values(key), base.values(key)
        if len(others) != len(firsts) or not firsts or min(firsts) <= 0:
            return None
        return Estimate.of([other / first - 1 for other, first in zip(others, firsts, strict=True)])

    def agreements(self) -> Iterator[tuple[Runs, str, float]]:
        """(runs that were measured, figure, simulated / measured - 1)."""
        for runs in self.runs:
            simulated = self.of(runs.part, runs.case, Way.SIMULATED)
            if runs.way is Way.SIMULATED or simulated is None:
                continue
            for key in COMPARED:
                measured, predicted = runs.estimate(key), simulated.estimate(key)
                if measured is not None and predicted is not None and measured.mean:
                    yield runs, key, predicted.mean / measured.mean - 1

    @property
    def beyond(self) -> list[tuple[Runs, str, float]]:
        """The agreements that are further off than `WITHIN`."""
        return [(runs, key, off) for runs, key, off in self.agreements() if abs(off) > WITHIN]

    def told(self) -> list[Mapping[str, object]]:
        """For a file: every figure of every run."""
        return [
            {
                "part": runs.part,
                "case": runs.case,
                "way": str(runs.way),
                "notes": list(runs.doubts),
                "figures": {key: runs.values(key) for key in ("completed", "failed", *FIGURES)},
            }
            for runs in self.runs
        ]
