"""How hard a cluster is asked at a point of a sweep, and what must be kept there. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from cluster.errors import InvalidRequest
from loadgen.metrics import Objectives, Summary
from loadgen.scenario import REQUESTS, Scenario

ROUNDS = 4
"""Requests of each user of a closed loop, at least: fewer would be mostly beginning and end."""


class LoadKind(StrEnum):
    """Open or closed loop."""

    RATE = "rate"
    """Sessions begun per second, whatever the cluster does."""
    CONCURRENCY = "concurrency"
    """Users, each of whom asks again when answered."""


@dataclass(frozen=True, slots=True)
class Load:
    """A load by its kind and number."""

    kind: LoadKind
    value: float

    def of(self, scenario: Scenario) -> Scenario:
        """The scenario under this load; a closed loop has requests for several rounds of its users."""
        if self.kind is LoadKind.RATE:
            return replace(scenario, rate=self.value)
        users = int(self.value)
        requests = scenario.requests or max(REQUESTS, ROUNDS * users * scenario.turns)
        return replace(scenario, concurrency=(users,), requests=requests)

    def __str__(self) -> str:
        return f"{self.kind} {self.value:.4g}"


@dataclass(frozen=True, slots=True)
class Standard:
    """What is asked of a point, and what points are compared by."""

    objectives: Objectives = field(default_factory=Objectives)
    attained: float = 0.9
    """Share of the requests that must keep the objectives."""
    slack: float = 0.05
    """Share that may fail or pile up, and what more users must gain at least in tokens per second."""
    maximise: str = ""
    """Key of the summaries; empty: tokens per dollar where there are prices, else per second, and where there
    are objectives of requests that kept them.
    """

    def __post_init__(self) -> None:
        if not 0 < self.attained <= 1:
            raise InvalidRequest("--attain is a share above 0, at most 1")

    def is_kept(self, load: Load, summary: Summary, lower: Summary | None) -> bool:
        """Whether the cluster bears a load. `lower`: the highest load it bore below, where one was tried: a
        closed loop without objectives can only be asked whether more users gained anything.
        """
        if not summary["completed"] or summary["failed"] > self.slack * summary["num_prompts"]:
            return False
        if (summary["piled_up_share"] or 0.0) > self.slack:
            return False
        if self.objectives.bounds_ms:
            return bool(summary["goodput_share"] >= self.attained)
        if load.kind is LoadKind.RATE or lower is None:
            return True
        return bool(summary["output_throughput"] >= (1 + self.slack) * lower["output_throughput"])

    def key(self, summary: Summary) -> str:
        """The figure by which points are compared."""
        return self.maximise or self.brought(summary)

    def brought(self, summary: Summary) -> str:
        """What a cluster brings, as a key: see `maximise`."""
        if summary.get("tokens_per_usd") is not None:
            return "good_tokens_per_usd" if self.objectives.bounds_ms else "tokens_per_usd"
        return "request_goodput" if self.objectives.bounds_ms else "output_throughput"


@dataclass(frozen=True, slots=True)
class Point:
    """One load on one cluster, with what came of it."""

    subject: str
    cluster: str
    settings: Mapping[str, Any]
    """Engine settings that differ from point to point, by key of the configuration."""
    load: Load
    is_kept: bool
    worth: float
    """The figure by which points are compared; 0 where the load was not borne."""
    summary: Summary

    @property
    def line(self) -> Summary:
        """One flat object: the keys of a run's summary, and those that say where the point is."""
        return {
            **self.summary,
            "subject": self.subject,
            "cluster": self.cluster,
            "settings": dict(self.settings),
            "load": str(self.load),
            "is_kept": self.is_kept,
            "worth": self.worth,
        }


@dataclass(frozen=True, slots=True)
class Course:
    """All loads on one cluster, in the order they were tried; `problem` where it could not go on."""

    subject: str
    cluster: str
    settings: Mapping[str, Any]
    points: tuple[Point, ...]
    problem: str = ""

    @property
    def best(self) -> Point | None:
        """The point worth most of those that were borne; None where there is none."""
        kept = [point for point in self.points if point.is_kept]
        return max(kept, key=lambda point: point.worth, default=None)

    @property
    def highest(self) -> Point | None:
        """The highest load that was borne."""
        kept = [point for point in self.points if point.is_kept]
        return max(kept, key=lambda point: point.load.value, default=None)

    @property
    def worth(self) -> float:
        """Of its best point; 0 without one."""
        return self.best.worth if self.best else 0.0
