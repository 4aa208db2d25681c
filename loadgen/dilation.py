"""Load on a cluster that keeps the time of another, slower by a factor: asked later, told as if not. Pure."""

from __future__ import annotations

from dataclasses import fields, replace

from anabranch.events import Timings
from loadgen.plan import Plan, Stage
from loadgen.records import Record
from loadgen.workload import Session


def dilated(plan: Plan, factor: float) -> Plan:
    """The same plan, every moment and pause of it that much longer."""
    return replace(plan, stages=tuple(_stage(stage, factor) for stage in plan.stages))


def undilated(record: Record, factor: float) -> Record:
    """A record as it would be of the emulated cluster: all its times, the server's too, divided."""

    def sooner(moment_s: float | None) -> float | None:
        return None if moment_s is None else moment_s / factor

    timings = _timings(record.timings, factor) if record.timings is not None else None
    deltas_s = tuple(moment_s / factor for moment_s in record.deltas_s)
    return replace(
        record,
        intended_s=record.intended_s / factor,
        sent_s=sooner(record.sent_s),
        first_token_s=sooner(record.first_token_s),
        last_token_s=sooner(record.last_token_s),
        ended_s=record.ended_s / factor,
        deltas_s=deltas_s,
        timings=timings,
    )


def _stage(stage: Stage, factor: float) -> Stage:
    return replace(
        stage,
        sessions=tuple(_session(session, factor) for session in stage.sessions),
        warm_up_s=stage.warm_up_s * factor,
        duration_s=None if stage.duration_s is None else stage.duration_s * factor,
    )


def _session(session: Session, factor: float) -> Session:
    turns = tuple(replace(turn, think_s=turn.think_s * factor) for turn in session.turns)
    return replace(session, turns=turns, at_s=None if session.at_s is None else session.at_s * factor)


def _timings(timings: Timings, factor: float) -> Timings:
    seconds = [field.name for field in fields(timings) if field.name.endswith("_seconds")]
    return replace(timings, **{name: getattr(timings, name) / factor for name in seconds})
