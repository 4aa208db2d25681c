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

STAYS = 4
"""How many times the p95 end-to-end latency an open loop lasts, at least: in less, little can pile up."""


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
    """Share that may fail, pile up or be left unsent, and what more users must gain at least in tokens per
    second.
    """
    maximise: str = ""
    """Key of the summaries; empty: tokens per dollar where there are prices, else per second, and where there
    are objectives of requests that kept them.
    """

    def __post_init__(self) -> None:
        if not 0 < self.attained <= 1:
            raise InvalidRequest("--attain is a share above 0, at most 1")

    def fault(self, load: Load, summary: Summary, lower: Summary | None) -> str:
        """Why a load was not borne, in plain words; empty where it was. `lower`: the highest load borne
        below, where one was tried: a closed loop without objectives can only be asked whether more users
        gained anything.
        """
        if not summary["completed"]:
            return "no request was completed"
        if summary["failed"] > self.slack * summary["num_prompts"]:
            return f"{summary['failed'] / summary['num_prompts']:.1%} of the requests failed"
        if not self.is_sent(summary):
            return f"only {summary['achieved_over_asked']:.0%} of it was sent: give more --senders"
        if (piled_up := summary["piled_up_share"] or 0.0) > self.slack:
            return f"{piled_up:.1%} of the requests piled up"
        if self.objectives.bounds_ms:
            share = summary["goodput_share"]
            return "" if share >= self.attained else f"only {share:.1%} keep the objectives"
        if load.kind is LoadKind.RATE or lower is None:
            return ""
        fewer, more = lower["output_throughput"], summary["output_throughput"]
        is_gain = more >= (1 + self.slack) * fewer
        return "" if is_gain else f"{more:,.0f} tokens/s, {fewer:,.0f} with fewer users"

    def is_sent(self, summary: Summary) -> bool:
        """Whether a load was put on the cluster at all: else it tells what the senders bear. Of few requests
        the share alone says nothing: their lag must matter beside the run, too.
        """
        share, lag_ms = summary["achieved_over_asked"], summary["p99_send_lag_ms"]
        if share is None or lag_ms is None:
            return True
        return bool(share >= 1 - self.slack or lag_ms <= 1000 * self.slack * summary["duration"])

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
    fault: str
    """Why the load was not borne; empty where it was."""
    worth: float
    """The figure by which points are compared; 0 where the load was not borne."""
    summary: Summary

    @property
    def is_kept(self) -> bool:
        """Whether the load was borne."""
        return not self.fault

    @property
    def warning(self) -> str:
        """Where the run was too short to say what its load piles up; else empty."""
        stay_ms, duration_s = self.summary["p95_e2el_ms"], self.summary["duration"]
        if self.load.kind is not LoadKind.RATE or stay_ms is None or 1000 * duration_s >= STAYS * stay_ms:
            return ""
        return (
            f"{duration_s:.1f} s are fewer than {STAYS} times the p95 end to end of {stay_ms / 1000:.1f} s, "
            "too few to see requests pile up: give a longer --duration"
        )

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
            "fault": self.fault,
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
