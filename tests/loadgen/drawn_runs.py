"""Runs of made-up records, summed up and priced as real ones are."""

from __future__ import annotations

import dataclasses

import numpy as np

from anabranch.events import Timings
from cluster import hardware, prices
from loadgen.cost import Bill, priced
from loadgen.members import Sample
from loadgen.metrics import Facts, Objectives, summarize
from loadgen.records import Outcome, Record
from loadgen.results import Run
from tests.loadgen.test_records import WHOLE

EVERY_S = 0.1


def drawn_run(
    name: str = "a run", *, slowness: float = 1.0, seed: int = 1, requests: int = 200, stage: str = "run"
) -> Run:
    """A request each tenth of a second, of ten tokens in a second or so; every fiftieth failed."""
    random = np.random.default_rng(seed)
    records = tuple(
        _record(number, stage, slowness * float(random.gamma(16, 1 / 16)), is_lost=number % 50 == 49)
        for number in range(requests)
    )
    objectives = Objectives.parse("ttft:200")
    facts = Facts(stage, 0.0, planned=requests, client_cpu_share=0.1, objectives=objectives)
    head = {
        "date": "2026-01-02T03:04:05Z",
        "version": "1",
        "client": "a machine",
        "backend": "anabranch",
        "endpoint": "127.0.0.1:1",
        "model_id": "<b>model</b> & co",
        "senders": 2,
        "objectives_ms": {"ttft": 200.0},
        "scenario": {"rate": 10.0},
        "content_seed": 1,
        "workload": {"requests": requests},
        "notes": ["3 prompts were clipped"],
    }
    summaries = [{**head, **summarize(records, facts)}]
    catalogue = hardware.built_in()
    bill = Bill.parse("dense=1xh100,attention=2xh20", prices.known(catalogue, None), catalogue)
    return Run(name, records, tuple(priced(records, summaries, bill)), _samples())


def _record(number: int, stage: str, stay_s: float, *, is_lost: bool) -> Record:
    sent_s = number * EVERY_S + 0.001
    deltas = tuple((sent_s + stay_s * np.linspace(0.2, 1.0, 10)).tolist())
    told = Timings(0.0, 0.2 * stay_s, 0.8 * stay_s, 0.3 * stay_s, 0.2 * stay_s, 0.1 * stay_s, 0.1 * stay_s, 0)
    whole = dataclasses.replace(
        WHOLE,
        session=number,
        turn=0,
        stage=stage,
        intended_s=number * EVERY_S,
        sent_s=sent_s,
        first_token_s=deltas[0],
        last_token_s=deltas[-1],
        ended_s=deltas[-1],
        prompt_tokens=100,
        asked_output_tokens=10,
        output_tokens=10,
        cached_tokens=0,
        deltas_s=deltas,
        delta_tokens=(1,) * 10,
        timings=told,
    )
    if not is_lost:
        return whole
    return dataclasses.replace(
        whole, outcome=Outcome.FAILED, finish_reason="", error="UNAVAILABLE: <gone>", timings=None
    )


def _samples() -> tuple[Sample, ...]:
    return tuple(
        sample
        for second in range(20)
        for sample in (
            Sample(second, "dense-0", "dense", "here", second % 7, 1, 0, 0, 0),
            Sample(second, "attention-0", "attention", "here", 0, 0, 100, 5 * second, 3),
        )
    )
