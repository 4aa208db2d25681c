"""Small studies and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadgen.study.figures import Runs, StudyResults
from loadgen.study.study import Study, Way
from loadgen.sweep.load import Standard
from tests.loadgen.queueing import swept_queues

SIMULATED_ONLY = """
seeds = [1, 2]
[[part]]
title = "A part"
ways = ["simulated"]
model = "llama3-8b"
load = { concurrency = 2, requests = 6, rows = [[64, 16], [32, 8]] }
[[part.case]]
name = "one"
dense = "h100"
[[part.case]]
name = "two"
dense = "h100"
attention = "h20"
overlap = false
"""


SOME = swept_queues(Standard())[0].points[0].summary
"""Of some queue."""


def two_cases(study: Study, throughputs: Sequence[Sequence[float]]) -> StudyResults:
    """Of the study above: tokens per second of each case, by seed; other figures are `SOME`."""
    (part,) = study.part
    runs = tuple(
        Runs(
            part.title,
            case.name,
            Way.SIMULATED,
            tuple({**SOME, "output_throughput": value, "usd_per_mtok": value / 10} for value in values),
            ("it was slow",) if case is part.case[-1] else (),
        )
        for case, values in zip(part.case, throughputs, strict=True)
    )
    return StudyResults(study, runs)


def told() -> Mapping[str, Any]:
    """Where and when."""
    return {"commit": "0123abc", "command": "study", "date": "2026-01-01", "machine": {"cores": 2}}
