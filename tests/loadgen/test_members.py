"""Members are asked beside a run, once a second, and never in its way."""

from __future__ import annotations

import threading
from contextlib import closing

from anabranch.answers import BlockAccount, Member, Topology
from cluster.errors import Unavailable
from loadgen.members import MemberWatch, Sample
from loadgen.plan import Stage
from loadgen.pool import StageCourse
from tests.loadgen.watching import Run

COURSE = StageCourse(Stage("run", (), 0.0), 0.0)
DENSE = Member("dense-0", "dense", 1, "a:1", "ready", "here", 1, None, 3, 2, 0, 0, 0)
ATTENTION = Member(
    "attention-0",
    "attention",
    1,
    "a:2",
    "ready",
    "here",
    2,
    BlockAccount(10, 4, 1, 1, 2, 2, 64),
    0,
    0,
    0,
    0,
    0,
)


class _Cluster:
    """Answers each question when it is let, with its members or not at all."""

    def __init__(self) -> None:
        self.let = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.fails = False
        self.closed = False

    def topology(self) -> Topology:
        self.asked.release()
        assert self.let.acquire(timeout=10)
        if self.fails:
            raise Unavailable("nobody there")
        return Topology((DENSE, ATTENTION), ())

    def close(self) -> None:
        self.closed = True


def test_one_question_at_a_time_and_one_a_second() -> None:
    """A cluster that is slow to answer is not asked again meanwhile, and the run does not wait for it."""
    cluster, kept = _Cluster(), list[Sample]()
    run = Run()
    with closing(run.stop):
        watch = MemberWatch(run, cluster, kept.append)
        for now_s in (0.0, 0.5, 1.0, 5.0):
            watch.looked(COURSE, now_s)
        assert cluster.asked.acquire(timeout=10)
        cluster.let.release()
        watch.close()
    assert not cluster.asked.acquire(blocking=False)
    assert cluster.closed
    assert kept == [
        Sample(0.0, "dense-0", "dense", "here", 3, 2, 0, 0, 0),
        Sample(0.0, "attention-0", "attention", "here", 0, 0, 10, 4, 2),
    ]
    assert [Sample.from_line(sample.to_line()) for sample in kept] == kept


def test_a_cluster_that_does_not_answer_spoils_nothing() -> None:
    """There are no samples, and no fault."""
    cluster, kept = _Cluster(), list[Sample]()
    cluster.fails = True
    run = Run()
    with closing(run.stop):
        watch = MemberWatch(run, cluster, kept.append)
        watch.looked(COURSE, 0.0)
        cluster.let.release()
        watch.close()
    assert kept == []
