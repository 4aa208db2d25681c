"""Runs of the real sender processes, watched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from loadgen.drivers.interface import Target
from loadgen.plan import Plan, Stage
from loadgen.pool import SenderPool, StageCourse, StopSwitch
from loadgen.prompts import PromptKind, source
from loadgen.records import Record
from loadgen.workload import Row, sessions
from tests.loadgen.paced import CONTEXT, VOCABULARY


class Run:
    """A plan on its way; `after` is called with it each time a request ended, and may stop it or do harm."""

    def __init__(self, after: Callable[[Run], None] = lambda _: None) -> None:
        self.records: list[Record] = []
        self.courses: list[StageCourse] = []
        self.stop = StopSwitch()
        self.process_ids: tuple[int, ...] = ()
        self._after = after

    def heard(self, record: Record) -> None:
        """See `Watcher`."""
        self.records.append(record)
        self._after(self)

    def looked(self, course: StageCourse, now_s: float) -> None:
        """See `Watcher`."""

    def do(self, plan: Plan, target: Target, senders: int = 1, kind: PromptKind = PromptKind.TOKENS) -> Run:
        """Send it all; `records` and `courses` tell how it went."""
        with closing(self.stop):
            pool = SenderPool(
                plan,
                target,
                source(kind, 1, VOCABULARY),
                senders=senders,
                run_id="test",
                watcher=self,
                stop=self.stop,
            )
            with closing(pool):
                self.process_ids = pool.process_ids
                self.courses = pool.run()
        return self


def closed(rows: list[Row], concurrency: int, turns: int = 1, think_s: float = 0.0) -> Plan:
    """A closed loop of one stage."""
    found, _ = sessions(rows, None, turns=turns, think_s=think_s, context=CONTEXT, seed=1)
    return Plan((Stage("run", tuple(found), 0.0, concurrency=concurrency),), (), {})
