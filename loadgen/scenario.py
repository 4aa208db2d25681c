"""What the user asks for, and the plan that follows from it. The only file that is read is the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from cluster.errors import InvalidRequest
from loadgen import fits, lengths, servegen, traces
from loadgen.arrivals import Arrivals, Constant, Gamma, Limit, Ramp, Replay, Seconds, poisson, spread
from loadgen.plan import Plan, Stage
from loadgen.prompts import PromptKind
from loadgen.traces import Trace
from loadgen.workload import (
    Row,
    Session,
    clipped,
    described,
    drawn,
    repeated,
    scaled,
    sessions,
    stream,
)

DURATION_S = 60.0
"""Of an open loop for which neither an end nor a number of requests is given."""

REQUESTS = 100
"""Of each step of a closed loop for which neither is given."""


class ArrivalKind(StrEnum):
    """Names of arrival processes."""

    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"
    RAMP = "ramp"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A run as it was asked for. Times are seconds, lengths tokens, rates sessions per second.

    Lengths come from `workload` (a named fit), `trace_file`, or else from `prompt` and `output`. A closed
    loop has `concurrency`, one stage for each number; an open loop has arrivals. `requests` counts all turns.
    """

    seed: int = 0
    arrivals: ArrivalKind | None = None
    rate: float | None = None
    rate_end: float | None = None
    cv: float | None = None
    concurrency: tuple[int, ...] = ()
    requests: int | None = None
    duration_s: float | None = None
    warm_up_s: float = 0.0
    workload: str = ""
    trace_file: Path | None = None
    trace_from_s: float = 0.0
    prompt: str = "512"
    output: str = "128"
    length_scale: float = 1.0
    context: int | None = None
    turns: int = 1
    think_s: float = 0.0
    prompts: PromptKind = PromptKind.TOKENS


def plan(scenario: Scenario, context: int) -> Plan:
    """The plan for a model whose longest sequence is `context`. Raises InvalidRequest for a wrong wish."""
    _check(scenario)
    workload = _Workload(scenario)
    if scenario.concurrency:
        stages, rows = _closed(scenario, workload, context)
    else:
        stages, rows = _open(scenario, workload, context)
    return Plan(stages, tuple(filter(None, workload.notes)), described(rows))


def _open(scenario: Scenario, workload: _Workload, context: int) -> tuple[tuple[Stage, ...], list[Row]]:
    duration_s = scenario.duration_s
    if duration_s is None and scenario.requests is None and not workload.replays:
        duration_s = DURATION_S
    times_s = workload.times_s(duration_s)
    if not len(times_s):
        raise InvalidRequest("no request arrives in this time: give a longer --duration, or a higher --rate")
    rows = workload.fitted(len(times_s) * scenario.turns, context)
    found, words = _sessions(scenario, rows, times_s, context)
    workload.notes.append(words)
    rate = workload.rate if workload.rate is not None else len(times_s) / float(times_s[-1] or 1.0)
    return (Stage("run", tuple(found), scenario.warm_up_s, request_rate=rate),), rows


def _closed(scenario: Scenario, workload: _Workload, context: int) -> tuple[tuple[Stage, ...], list[Row]]:
    """A stage for each number of users, each with sessions of its own: none asks what an earlier one did."""
    each = _sessions_of(scenario, scenario.requests or REQUESTS)
    rows = workload.fitted(each * scenario.turns * len(scenario.concurrency), context)
    found, words = _sessions(scenario, rows, None, context)
    workload.notes.append(words)
    stages = tuple(
        Stage(
            f"concurrency {users}",
            tuple(found[place * each : (place + 1) * each]),
            scenario.warm_up_s,
            concurrency=users,
            duration_s=scenario.duration_s,
        )
        for place, users in enumerate(scenario.concurrency)
    )
    return stages, rows


def _sessions(
    scenario: Scenario, rows: Sequence[Row], times_s: Seconds | None, context: int
) -> tuple[list[Session], str]:
    return sessions(
        rows, times_s, turns=scenario.turns, think_s=scenario.think_s, context=context, seed=scenario.seed
    )


class _Workload:
    """Where rows and moments come from; `notes` collects what is to be said aloud."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.notes: list[str] = []
        self._fit = fits.named(scenario.workload) if scenario.workload else None
        self._trace = _trace(scenario)
        timed = self._trace is not None and self._trace.is_timed
        kind = scenario.arrivals
        if kind is None and timed and (scenario.rate is None or _is_servegen(scenario)):
            kind = ArrivalKind.TRACE
        self.replays = kind is ArrivalKind.TRACE and not scenario.concurrency
        self._kind = kind
        self.rate = scenario.rate or (self._fit.rate if self._fit and not scenario.concurrency else None)
        if self._fit is not None:
            self.notes.append(f"workload {self._fit.label}")
        if self.replays and scenario.turns > 1:
            raise InvalidRequest("a replayed trace has its own requests: leave --turns out")

    def times_s(self, duration_s: float | None) -> Seconds:
        """Moments of an open loop."""
        random = stream(self._scenario.seed, "arrivals")
        asked = self._scenario.requests
        most = None if asked is None else _sessions_of(self._scenario, asked)
        arrivals = self._replay() if self.replays else self._process(duration_s)
        if most is None and duration_s is None:
            return arrivals.times_s(random, Limit(len(self._trace.rows) if self._trace else None))
        return arrivals.times_s(random, Limit(most, duration_s))

    def fitted(self, count: int, context: int) -> list[Row]:
        """`count` rows that the model can take."""
        scenario = self._scenario
        if self._fit is not None:
            rows = self._fit.rows(scenario.seed, count)
        elif self._trace is not None:
            rows, again = repeated(self._trace.rows, count)
            self.notes.append(again)
        else:
            prompts, outputs = lengths.parse(scenario.prompt), lengths.parse(scenario.output)
            rows = drawn(prompts, outputs, scenario.seed, count)
        if scenario.length_scale != 1:
            rows = scaled(rows, scenario.length_scale)
            self.notes.append(f"all lengths times {scenario.length_scale:g}")
        rows, words = clipped(rows, context)
        self.notes.append(words)
        return rows

    def _process(self, duration_s: float | None) -> Arrivals:
        scenario, rate = self._scenario, self.rate
        if rate is None:
            raise InvalidRequest("say how many sessions begin per second (--rate), or --concurrency")
        if self._kind is None and self._fit is not None and scenario.rate is None:
            self.notes.append(f"arrivals as fitted: {rate:g} per second, gaps of cv {self._fit.cv:g}")
            return self._fit.arrivals
        if self._kind is ArrivalKind.RAMP:
            return Ramp(rate, scenario.rate_end or 0.0, duration_s or 0.0)
        cv = scenario.cv if scenario.cv is not None else self._fit.cv if self._fit else 1.0
        simple: dict[ArrivalKind, Callable[[], Arrivals]] = {
            ArrivalKind.POISSON: lambda: poisson(rate),
            ArrivalKind.GAMMA: lambda: Gamma(rate, cv),
            ArrivalKind.CONSTANT: lambda: Constant(rate),
        }
        return simple[self._kind or ArrivalKind.POISSON]()

    def _replay(self) -> Replay:
        """The trace's moments, faster or slower where a rate is asked for; ServeGen's clients have theirs."""
        if self._trace is None:
            raise InvalidRequest("--arrivals trace replays a --trace-file")
        times_s = self._trace.times_s()
        if coarse := self._trace.stamps_line():
            self.notes.append(coarse)
            times_s = tuple(spread(np.array(times_s), stream(self._scenario.seed, "spread")).tolist())
        span_s = times_s[-1] - times_s[0]
        recorded = len(times_s) / span_s if span_s else 1.0
        speed = 1.0
        if self._scenario.rate is not None and not _is_servegen(self._scenario):
            speed = self._scenario.rate / recorded
            self.notes.append(f"the trace's {recorded:.3g} requests per second are replayed at {speed:.3g} x")
        self.rate = recorded * speed
        return Replay(times_s, speed)


def _sessions_of(scenario: Scenario, requests: int) -> int:
    """How many sessions make at least so many requests."""
    return -(-requests // scenario.turns)


def _trace(scenario: Scenario) -> Trace | None:
    if scenario.trace_file is None:
        return None
    if not _is_servegen(scenario):
        trace = traces.read(scenario.trace_file)
        return trace.since(scenario.trace_from_s) if scenario.trace_from_s else trace
    if scenario.duration_s is None:
        raise InvalidRequest("a ServeGen trace is drawn for a --duration: give one")
    clients = servegen.read(scenario.trace_file)
    rows = servegen.draw(clients, scenario.seed, scenario.trace_from_s, scenario.duration_s, scenario.rate)
    return Trace(tuple(rows))


def _is_servegen(scenario: Scenario) -> bool:
    return scenario.trace_file is not None and servegen.is_servegen(scenario.trace_file)


def _check(scenario: Scenario) -> None:
    """Wishes that contradict each other."""
    kind = scenario.arrivals
    refusals = {
        "give either --workload or --trace-file": bool(scenario.workload) and scenario.trace_file is not None,
        "a closed loop (--concurrency) has no --rate and no --arrivals": bool(scenario.concurrency)
        and (scenario.rate is not None or kind is not None),
        "--concurrency is a list of numbers above 0": any(users < 1 for users in scenario.concurrency),
        "--cv belongs to --arrivals gamma": scenario.cv is not None and kind is not ArrivalKind.GAMMA,
        "--arrivals gamma needs --cv": kind is ArrivalKind.GAMMA
        and scenario.cv is None
        and not scenario.workload,
        "--arrivals ramp needs --rate, --rate-end and --duration": kind is ArrivalKind.RAMP
        and None in (scenario.rate, scenario.rate_end, scenario.duration_s),
        "--rate-end belongs to --arrivals ramp": scenario.rate_end is not None
        and kind is not ArrivalKind.RAMP,
        "--warm-up is longer than --duration": scenario.duration_s is not None
        and scenario.warm_up_s >= scenario.duration_s,
        "--turns is at least 1": scenario.turns < 1,
    }
    for words, holds in refusals.items():
        if holds:
            raise InvalidRequest(words)
