"""A cluster that keeps the time of another says so, and is measured in that time."""

from __future__ import annotations

from contextlib import closing
from time import monotonic

import pytest

from cluster.errors import InvalidRequest
from loadgen.measurement import Measurement, Settings
from loadgen.pool import StageCourse
from loadgen.prompts import PromptKind
from loadgen.scenario import Scenario
from tests.loadgen.paced import GrpcServer, OpenAiServer, Script
from tests.loadgen.watching import Run

LOAD = Scenario(concurrency=(1,), requests=2, prompt="8", output="3")
FIRST_S = 0.4


class _Moments(Run):
    """Also keeps how late the run was seen to be, and where its stage began."""

    def __init__(self) -> None:
        super().__init__()
        self.last_s = 0.0
        self.begins_s = 0.0

    def looked(self, course: StageCourse, now_s: float) -> None:
        """See `Watcher`."""
        self.begins_s, self.last_s = course.begins_s, now_s


def test_a_cluster_is_measured_in_the_time_that_it_says_it_keeps() -> None:
    """Latencies, and the moments that onlookers are told, are a quarter of what passes here; a request may
    take four times as long.
    """
    with GrpcServer(Script(first_s=FIRST_S, gap_s=0.01, dilation=4.0)) as server:
        run = _Moments()
        with closing(run.stop):
            measurement = Measurement(LOAD, server.target, Settings(senders=1))
            began_s = monotonic()
            (summary,) = measurement.run(run, run.stop, lambda _: None)
            passed_s = monotonic() - began_s
    assert FIRST_S / 4 <= summary["median_ttft_ms"] / 1000 < FIRST_S
    assert FIRST_S / 4 <= run.last_s <= passed_s / 4
    assert run.begins_s <= run.records[0].ended_s - FIRST_S / 4
    assert summary["notes"] == ["an emulated cluster: its times are divided by 4"]
    assert measurement.target.timeout_s == 4 * server.target.timeout_s


def test_a_cluster_knows_its_dilation_better_than_the_user() -> None:
    """The same number is no harm, another is refused with both; nothing told is a cluster of its own time."""
    with GrpcServer(Script(dilation=4.0)) as slow, GrpcServer() as plain:
        Measurement(LOAD, slow.target, Settings(dilation=4.0))
        with pytest.raises(InvalidRequest, match="--dilation 40: paced says that its dilation is 4;"):
            Measurement(LOAD, slow.target, Settings(dilation=40.0))
        with pytest.raises(InvalidRequest, match="its dilation is 1;"):
            Measurement(LOAD, plain.target, Settings(dilation=40.0))
        assert Measurement(LOAD, plain.target, Settings()).target.timeout_s == plain.target.timeout_s


@pytest.mark.parametrize(("given", "factor"), [(None, 1.0), (40.0, 40.0)])
def test_where_nobody_can_tell_the_user_does(given: float | None, factor: float) -> None:
    """OpenAI's API has no word for it."""
    texts = Scenario(
        concurrency=(1,), requests=1, prompt="8", output="3", context=64, prompts=PromptKind.TEXT
    )
    with OpenAiServer() as server:
        measurement = Measurement(texts, server.target, Settings(dilation=given))
    assert measurement.target.timeout_s == factor * server.target.timeout_s
