"""A server of known capacity as arithmetic: so many requests at once, each for so long, the others wait."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from loadgen import scenario as scenarios
from loadgen.metrics import Facts, Objectives, Summary, summarize
from loadgen.plan import Stage
from loadgen.records import Record
from loadgen.scenario import Scenario
from loadgen.sweep.load import Course, LoadKind, Standard
from loadgen.sweep.sweep import Loads, Measure, Subject, Sweep
from tests.loadgen.test_records import WHOLE

OUTPUT_TOKENS = 10


def queue(
    places: int,
    stay_s: float,
    objectives: Objectives,
    settings: Mapping[str, Any],
    sent_per_s: float = float("inf"),
) -> Subject:
    """Bears `places / stay_s` requests per second; more users than `places` gain nothing. Its senders send no
    more than `sent_per_s`.
    """

    def measure(scenario: Scenario) -> Summary:
        (stage,) = scenarios.plan(scenario, 4096).stages
        facts = Facts(
            stage.name,
            0.0,
            stage.requests,
            client_cpu_share=0.0,
            request_rate=stage.request_rate,
            concurrency=stage.concurrency,
            objectives=objectives,
        )
        head = {
            "date": "2026-01-02T03:04:05Z",
            "version": "1",
            "backend": "a queue",
            "model_id": "<b>queue</b>",
            "scenario": {"duration_s": scenario.duration_s},
            "workload": {"requests": stage.requests},
            "notes": [],
        }
        return {**head, **summarize(_served(stage, places, stay_s, sent_per_s), facts)}

    @contextmanager
    def opened() -> Iterator[Measure]:
        yield measure

    return Subject(f"queue of {places} {dict(settings)}", f"queue of {places}", settings, opened)


def swept_queues(standard: Standard) -> list[Course]:
    """Two queues under three rates each, of which the highest is too much for both."""
    scenario = Scenario(duration_s=60.0, prompt="8", output="8")
    loads = Loads(LoadKind.RATE, (2.0, 8.0, 32.0))
    return [
        Sweep(scenario, loads, standard, lambda _: None, lambda: True).run(
            queue(places, stay_s, standard.objectives, {"stay": stay_s})
        )
        for places, stay_s in ((4, 0.5), (8, 0.7))
    ]


def _served(stage: Stage, places: int, stay_s: float, sent_per_s: float) -> list[Record]:
    """In the order of their beginning; in a closed loop each user is asked again when answered."""
    free_s = [0.0] * places
    sent_s = 0.0
    users_s = [0.0] * (stage.concurrency or 0)
    records = []
    for session in stage.sessions:
        due_s = heapq.heappop(users_s) if session.at_s is None else session.at_s
        sent_s = max(due_s, sent_s + 1 / sent_per_s) if stage.concurrency is None else due_s
        begins_s = max(sent_s, heapq.heappop(free_s))
        heapq.heappush(free_s, begins_s + stay_s)
        if session.at_s is None:
            heapq.heappush(users_s, begins_s + stay_s)
        served = _record(stage.name, session.index, due_s, begins_s + stay_s, begins_s + stay_s / 2)
        records.append(dataclasses.replace(served, sent_s=sent_s))
    return records


def _record(stage: str, number: int, due_s: float, ended_s: float, first_s: float) -> Record:
    gap_s = (ended_s - first_s) / (OUTPUT_TOKENS - 1)
    return dataclasses.replace(
        WHOLE,
        session=number,
        turn=0,
        stage=stage,
        intended_s=due_s,
        first_token_s=first_s,
        last_token_s=ended_s,
        ended_s=ended_s,
        output_tokens=OUTPUT_TOKENS,
        asked_output_tokens=OUTPUT_TOKENS,
        deltas_s=tuple(first_s + gap_s * place for place in range(OUTPUT_TOKENS)),
        delta_tokens=(1,) * OUTPUT_TOKENS,
    )
