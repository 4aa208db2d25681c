"""A run while it goes on: counts, rates of the last seconds, percentiles so far. Pure."""

from __future__ import annotations

from collections import deque

import numpy as np

from loadgen.pool import StageCourse
from loadgen.records import Outcome, Record

_RATE_S = 5.0
"""Rates are over the last this many seconds."""


class LiveFigures:
    """Figures of the stage that is under way; begins anew with each."""

    def __init__(self) -> None:
        self._stage = ""
        self._counts = dict.fromkeys(Outcome, 0)
        self._latencies_ms: dict[str, list[float]] = {"TTFT": [], "TPOT": []}
        self._ended: deque[tuple[float, int]] = deque()  # (moment, output tokens)

    def heard(self, record: Record) -> None:
        """A request ended."""
        if record.stage != self._stage:
            self._begin(record.stage)
        self._counts[record.outcome] += 1
        if record.outcome is Outcome.COMPLETED:
            self._ended.append((record.ended_s, record.output_tokens))
            for name, value_s in (("TTFT", record.ttft_s), ("TPOT", record.tpot_s)):
                if value_s is not None:
                    self._latencies_ms[name].append(value_s * 1000)

    def line(self, course: StageCourse, now_s: float) -> str:
        """How things stand."""
        if course.stage.name != self._stage:
            self._begin(course.stage.name)
        while self._ended and self._ended[0][0] < now_s - _RATE_S:
            self._ended.popleft()
        passed_s = max(0.0, now_s - course.begins_s)
        span_s = min(_RATE_S, passed_s) or 1.0
        tokens = sum(count for _, count in self._ended)
        parts = [
            f"{self._stage}: {passed_s:.0f} s",
            f"sent {course.sent:,} of {course.stage.requests:,}",
            f"under way {course.under_way:,}",
            f"completed {self._counts[Outcome.COMPLETED]:,}",
            f"failed {self._counts[Outcome.FAILED]:,}",
            f"{len(self._ended) / span_s:.1f} requests/s, {tokens / span_s:,.0f} tokens/s",
        ]
        for name, values in self._latencies_ms.items():
            if values:
                median, high = np.percentile(values, (50, 99))
                parts.append(f"{name} {median:,.0f} ms (p99 {high:,.0f})")
        return "  ".join(parts)

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._counts = dict.fromkeys(Outcome, 0)
        self._latencies_ms = {name: [] for name in self._latencies_ms}
        self._ended.clear()
