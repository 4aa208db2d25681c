"""What the user asks for, and the plan that follows from it. The only file that is read is the trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeAlias

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
    material = _material(scenario)
    made = _closed if scenario.concurrency else _open
    stages, rows, notes = made(scenario, material, context)
    return Plan(stages, tuple(filter(None, (*material.notes, *notes))), described(rows))


def recorded(scenario: Scenario) -> tuple[int | None, float | None]:
    """(requests, sessions per second) of the trace, or of the trace that the workload is fitted to: None for
    requests that are drawn, and for a rate that nobody knows. Raises InvalidRequest for a wrong wish.
    """
    _check(scenario)
    material = _material(scenario)
    return material.count, material.rate


@dataclass(frozen=True, slots=True)
class _Material:
    """What requests are made of. `rows` gives so many, and a line about them; `recorded` and `rate` are
    arrivals as they were where this comes from, None where nobody knows; `count` is how many a trace has.
    """

    rows: Callable[[int], tuple[list[Row], str]]
    notes: tuple[str, ...] = ()
    recorded: Gamma | Replay | None = None
    rate: float | None = None
    count: int | None = None


_Made: TypeAlias = tuple[tuple[Stage, ...], list[Row], list[str]]
"""Stages, their rows, and what is to be said aloud."""


def _open(scenario: Scenario, material: _Material, context: int) -> _Made:
    arrivals, rate, words = _arrivals(scenario, material)
    times_s = arrivals.times_s(stream(scenario.seed, "arrivals"), _limit(scenario, arrivals))
    if not len(times_s):
        raise InvalidRequest("no request arrives in this time: give a longer --duration, or a higher --rate")
    rows, notes = _fitting(scenario, material, len(times_s) * scenario.turns, context)
    found, dropped = _sessions(scenario, rows, times_s, context)
    stage = Stage("run", tuple(found), scenario.warm_up_s, request_rate=rate)
    return (stage,), rows, [words, *notes, dropped]


def _closed(scenario: Scenario, material: _Material, context: int) -> _Made:
    """A stage for each number of users, each with sessions of its own: none asks what an earlier one did."""
    each = _sessions_of(scenario, scenario.requests or REQUESTS)
    count = each * scenario.turns * len(scenario.concurrency)
    rows, notes = _fitting(scenario, material, count, context)
    found, dropped = _sessions(scenario, rows, None, context)
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
    return stages, rows, [*notes, dropped]


def _sessions(
    scenario: Scenario, rows: Sequence[Row], times_s: Seconds | None, context: int
) -> tuple[list[Session], str]:
    return sessions(
        rows, times_s, turns=scenario.turns, think_s=scenario.think_s, context=context, seed=scenario.seed
    )


def _sessions_of(scenario: Scenario, requests: int) -> int:
    """How many sessions make at least so many requests."""
    return -(-requests // scenario.turns)


def _limit(scenario: Scenario, arrivals: Arrivals) -> Limit:
    duration_s = scenario.duration_s
    if scenario.requests is not None:
        return Limit(_sessions_of(scenario, scenario.requests), duration_s)
    if duration_s is None and isinstance(arrivals, Replay):
        return Limit(len(arrivals.recorded_s))
    return Limit(duration_s=duration_s or DURATION_S)


def _fitting(
    scenario: Scenario, material: _Material, count: int, context: int
) -> tuple[list[Row], list[str]]:
    """`count` rows that the model can take, and what was done to them."""
    rows, words = material.rows(count)
    notes = [words]
    if scenario.length_scale != 1:
        rows = scaled(rows, scenario.length_scale)
        notes.append(f"all lengths times {scenario.length_scale:g}")
    rows, words = clipped(rows, context)
    return rows, [*notes, words]


def _arrivals(scenario: Scenario, material: _Material) -> tuple[Arrivals, float, str]:
    """When sessions begin, how many a second, and a line that says so where nobody asked for it."""
    kind, recorded = scenario.arrivals, material.recorded
    if kind is ArrivalKind.TRACE and (not isinstance(recorded, Replay) or material.rate is None):
        raise InvalidRequest("--arrivals trace replays a --trace-file that has times")
    if recorded is not None and material.rate is not None and _as_recorded(scenario):
        if isinstance(recorded, Gamma):
            words = f"arrivals as fitted: {recorded.rate:g} per second, cv {recorded.cv:g}"
            return recorded, recorded.rate, words
        return _replayed(scenario, recorded, material.rate)
    rate = material.rate if scenario.rate is None else scenario.rate
    if rate is None:
        raise InvalidRequest("say how many sessions begin per second (--rate), or --concurrency")
    fitted_cv = recorded.cv if isinstance(recorded, Gamma) else 1.0
    cv = fitted_cv if scenario.cv is None else scenario.cv
    processes: dict[ArrivalKind, Callable[[], Arrivals]] = {
        ArrivalKind.POISSON: lambda: poisson(rate),
        ArrivalKind.GAMMA: lambda: Gamma(rate, cv),
        ArrivalKind.CONSTANT: lambda: Constant(rate),
        ArrivalKind.RAMP: lambda: Ramp(rate, scenario.rate_end or rate, scenario.duration_s or DURATION_S),
    }
    words = "" if kind or recorded is None else _poisson_words(rate, recorded)
    return processes[kind or ArrivalKind.POISSON](), rate, words


def _poisson_words(rate: float, recorded: Gamma | Replay) -> str:
    """A rate takes the workload's own arrivals away."""
    if isinstance(recorded, Gamma):
        instead = f"not of cv {recorded.cv:.3g}, as fitted (--arrivals gamma)"
    else:
        instead = "not as recorded (--arrivals trace)"
    return f"arrivals are Poisson at {rate:g} per second, {instead}"


def _as_recorded(scenario: Scenario) -> bool:
    """A rate makes a trace a list of lengths; ServeGen's clients have been drawn for it already."""
    if scenario.arrivals is None:
        return scenario.rate is None or _is_servegen(scenario)
    return scenario.arrivals is ArrivalKind.TRACE


def _replayed(scenario: Scenario, recorded: Replay, rate: float) -> tuple[Replay, float, str]:
    if scenario.turns > 1:
        raise InvalidRequest("a replayed trace has its own requests: leave --turns out")
    if scenario.rate is None:
        return recorded, rate, ""
    if _is_servegen(scenario):
        return recorded, scenario.rate, ""
    speed = scenario.rate / rate
    words = f"the trace's {rate:.3g} requests per second are replayed at {speed:.3g} x"
    return replace(recorded, speed=speed), scenario.rate, words


def _material(scenario: Scenario) -> _Material:
    seed = scenario.seed
    if scenario.workload:
        fit = fits.named(scenario.workload)
        label = f"workload {fit.label}"
        return _Material(lambda count: (fit.rows(seed, count), ""), (label,), fit.arrivals, fit.rate)
    if scenario.trace_file is not None:
        return _of_trace(scenario, scenario.trace_file, _trace(scenario, scenario.trace_file))
    prompts, outputs = lengths.parse(scenario.prompt), lengths.parse(scenario.output)
    return _Material(lambda count: (drawn(prompts, outputs, seed, count), ""))


def _of_trace(scenario: Scenario, file: Path, trace: Trace) -> _Material:
    rows, count = partial(repeated, trace.rows), len(trace.rows)
    label = f"trace {file} ({count:,} requests)"
    if not trace.is_timed:
        return _Material(rows, (label,), count=count)
    times_s, coarse = trace.times_s(), trace.stamps_line()
    if coarse:
        times_s = tuple(spread(np.array(times_s), stream(scenario.seed, "spread")).tolist())
    rate = (len(times_s) - 1) / (times_s[-1] - times_s[0]) if times_s[-1] > times_s[0] else None
    return _Material(rows, (label, coarse), Replay(times_s), rate, count)


def _trace(scenario: Scenario, file: Path) -> Trace:
    if not _is_servegen(scenario):
        trace = traces.read(file)
        return trace.since(scenario.trace_from_s) if scenario.trace_from_s else trace
    if scenario.duration_s is None:
        raise InvalidRequest("a ServeGen trace is drawn for a --duration: give one")
    clients = servegen.read(file)
    drawn_rows = servegen.draw(
        clients, scenario.seed, scenario.trace_from_s, scenario.duration_s, scenario.rate
    )
    return Trace(tuple(drawn_rows))


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
