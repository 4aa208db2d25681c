"""A run from wish to figures: ask the endpoint, plan, send, sum up. What the command line and sweeps call."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import os
import platform
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidRequest
from loadgen import scenario as scenarios
from loadgen.cost import Bill, priced
from loadgen.dilation import dilated, undilated
from loadgen.drivers.interface import Endpoint, Target
from loadgen.drivers.opening import open_driver
from loadgen.metrics import Facts, Objectives, Summary, summarize
from loadgen.plan import Plan
from loadgen.pool import SenderPool, StageCourse, StopSwitch, Watcher
from loadgen.prompts import source
from loadgen.records import Record
from loadgen.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Settings:
    """How a scenario is measured."""

    senders: int = 2
    objectives: Objectives = field(default_factory=Objectives)
    vocabulary: int | None = None
    """Token ids to draw from, where the endpoint does not tell."""
    bill: Bill | None = None
    """What is paid for, where costs are wanted."""
    dilation: float | None = None
    """How many times slower the endpoint is than what it emulates, where it does not tell."""


class Measurement:
    """One run against one target: first `plan` is known, then `run` gives the figures."""

    def __init__(self, scenario: Scenario, target: Target, settings: Settings) -> None:
        """Asks the endpoint what it is. Raises errors of cluster.errors: InvalidRequest for a wrong wish."""
        self._scenario = scenario
        self._settings = settings
        self.endpoint = asyncio.run(_ask(target))
        self._dilation = _dilation(settings.dilation, self.endpoint)
        self.target = dataclasses.replace(
            target, model=self.endpoint.model, timeout_s=target.timeout_s * self._dilation
        )
        # Contents are new in each run: what a server has cached of an earlier one would flatter this one.
        self._content_seed = secrets.randbits(32)
        vocabulary = self.endpoint.vocabulary or settings.vocabulary
        self._source = source(scenario.prompts, self._content_seed, vocabulary)
        self.plan: Plan = scenarios.plan(scenario, self._context())
        self.was_stopped = False

    def run(self, watcher: Watcher, stop: StopSwitch, keep: Callable[[Record], None]) -> list[Summary]:
        """The figures of every stage that was begun; `keep` is given each request as it ends."""
        records: list[Record] = []
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        pool = SenderPool(
            dilated(self.plan, self._dilation),
            self.target,
            self._source,
            senders=self._settings.senders,
            run_id=f"load-{uuid.uuid4().hex[:8]}",
            watcher=_Keeping(watcher, records, keep, self._dilation),
            stop=stop,
        )
        try:
            courses = pool.run()
        finally:
            pool.close()
        self.was_stopped = stop.is_set
        head = {"date": began, **self._description()}
        summaries = [{**head, **summarize(records, self._facts(course))} for course in courses]
        bill = self._settings.bill
        return priced(records, summaries, bill) if bill else summaries

    def _context(self) -> int:
        known = [value for value in (self._scenario.context, self.endpoint.context) if value is not None]
        if not known:
            raise InvalidRequest("this endpoint does not tell its context: give --context")
        return min(known)

    def _facts(self, course: StageCourse) -> Facts:
        stage = course.stage
        return Facts(
            stage=stage.name,
            counts_from_s=(course.begins_s + stage.warm_up_s) / self._dilation,
            planned=stage.requests,
            client_cpu_share=course.client_cpu_share,
            request_rate=stage.request_rate,
            concurrency=stage.concurrency,
            objectives=self._settings.objectives,
        )

    def _emulated(self) -> list[str]:
        factor = self._dilation
        return [f"an emulated cluster: its times are divided by {factor:g}"] if factor != 1 else []

    def _description(self) -> dict[str, Any]:
        """What was run, beside its figures."""
        scenario = {
            name: str(value) if name in ("trace_file", "arrivals", "prompts") and value is not None else value
            for name, value in dataclasses.asdict(self._scenario).items()
        }
        return {
            "version": importlib.metadata.version("anabranch"),
            "client": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "backend": "openai" if self.target.url else "anabranch",
            "endpoint": self.target.place,
            "model_id": self.endpoint.model,
            "senders": self._settings.senders,
            "objectives_ms": dict(self._settings.objectives.bounds_ms),
            "scenario": scenario,
            "content_seed": self._content_seed,
            "workload": dict(self.plan.workload),
            "notes": [*self.plan.notes, *self._emulated()],
        }


class _Keeping:
    """A `Watcher` that keeps records for the figures, and passes all on."""

    def __init__(
        self, watcher: Watcher, records: list[Record], keep: Callable[[Record], None], dilation: float
    ) -> None:
        self._dilation = dilation
        self._watcher = watcher
        self._records = records
        self._keep = keep

    def heard(self, record: Record) -> None:
        """See `Watcher`."""
        record = undilated(record, self._dilation)
        self._records.append(record)
        self._keep(record)
        self._watcher.heard(record)

    def looked(self, course: StageCourse, now_s: float) -> None:
        """See `Watcher`."""
        course = dataclasses.replace(course, begins_s=course.begins_s / self._dilation)
        self._watcher.looked(course, now_s / self._dilation)


def _dilation(given: float | None, endpoint: Endpoint) -> float:
    """All times are divided by it. A cluster knows its own; another number would only spoil its figures."""
    told = endpoint.dilation
    if told is None:
        return given or 1.0
    if given not in (None, told):
        raise InvalidRequest(
            f"--dilation {given:g}: {endpoint.model} says that its dilation is {told:g}; leave the option out"
        )
    return told


async def _ask(target: Target) -> Endpoint:
    driver = open_driver(target)
    try:
        return await driver.endpoint()
    finally:
        await driver.close()
