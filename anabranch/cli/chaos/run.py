"""One seed: a fleet, the load once undisturbed and once under faults, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any

from anabranch.cli.chaos import model, schedule
from anabranch.cli.chaos.fleet import Fleet
from anabranch.cli.chaos.load import Answer, Load
from anabranch.cli.chaos.lost_capacity import Lost, lose
from anabranch.cli.chaos.network import Network
from anabranch.cli.chaos.orders import Orders
from anabranch.cli.chaos.schedule import Request
from anabranch.cli.chaos.strike import Striker, Struck
from cluster import config as configuration
from cluster.config import Config
from cluster.errors import Unavailable

STEP_TOKENS = 64

_FREE_S = 20.0
"""Time after the load in which every block must be free again: leases of lost sequences run out in it."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run. load: share of what the fleet can serve, less where that would be over before
    `seconds_least`. faults_most: no more than this many, None: as many as the load's time allows. expiry_ms:
    silence after which a process is taken for dead. lost_capacity: whole roles are lost instead, in arenas so
    small that one cannot hold what runs.
    """

    seed: int
    requests: int = 200
    load: float = 0.25
    seconds_least: float = 0.0
    faults_most: int | None = None
    kinds: tuple[schedule.Kind, ...] = schedule.KINDS
    gateways: int = 2
    dense_workers: int = 2
    attention_workers: int = 3
    expiry_ms: int = 1000
    lost_capacity: bool = False


@dataclass(slots=True)
class Course:
    """How a run went; times are monotonic seconds. `disturbed` are the answers that ended: where the fleet
    did not recover, the rest is nobody's failure.
    """

    settings: Settings
    calm: list[Answer] = field(default_factory=list)
    disturbed: list[Answer] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    starts: int = 0
    load_share: float = 0.0
    """The load's tokens per second, over what the fleet gave when it was asked for as much as it can."""
    clock_offset_s: float = 0.0
    """What to add to monotonic seconds for those of the logs."""

    def calm_of(self) -> dict[str, Answer]:
        """The undisturbed answers by the names of their requests."""
        return {answer.request.name: answer for answer in self.calm}


def configured(settings: Settings, folder: Path) -> Config:
    """The configuration of the fleet under test: small steps and blocks, arenas so small that cache is moved
    between them, quick to notice a loss.
    """
    overrides: dict[str, Any] = {
        "model.path": str(folder),
        "model.name": "chaos",
        "gateway.replicas": settings.gateways,
        "gateway.port": 0,
        "gateway.http_port": None,
        "dense.replicas": settings.dense_workers,
        "dense.step_tokens": STEP_TOKENS,
        "dense.max_batch": 32,
        "attention.replicas": settings.attention_workers,
        "attention.arena": "128KiB" if settings.lost_capacity else "256KiB",
        "attention.block_tokens": 16,
        "attention.lease_ms": 6000,
        "placement.shard_tokens": 64,
        "placement.plan_interval_s": 0.25,
        "placement.move_gain": 0.0,
        "placement.move_tokens": 32,
        "lanes.transports": [schedule.transport(settings.seed)],
        "lanes.deadline_floor_ms": 1000,
        "controller.port": 0,
        "controller.heartbeat_ms": 100,
        "controller.expiry_ms": settings.expiry_ms,
        "controller.drain_grace_s": 5.0,
        "telemetry.log_level": "debug",
    }
    return configuration.load(None, overrides)


async def run(settings: Settings, folder: Path, tell: Tell) -> Course:
    """Run one seed in `folder`. That the fleet does not come up, or does not recover, is a problem of it."""
    course = Course(settings, clock_offset_s=time() - monotonic())
    model_folder, logs = folder / "model", folder / "logs"
    model_folder.mkdir()
    logs.mkdir()
    model.write(model_folder)
    with contextlib.closing(Network()) as network:
        orders = Orders(folder / "orders")
        await orders.start()
        fleet = Fleet(configured(settings, model_folder), logs, network, orders.path)
        try:
            tell("starting")
            await fleet.start()
            await _serve(course, fleet, network, orders, tell)
            await _settle(course, fleet, tell)
            fleet.close()
        except Unavailable as error:
            course.problems.append(error.message)
            course.disturbed = [answer for answer in course.disturbed if answer.ended_s]
        finally:
            fleet.kill_all()
            await orders.close()
            course.problems += fleet.problems
            course.logs, course.starts = fleet.logs(), fleet.starts
    return course


async def _serve(course: Course, fleet: Fleet, network: Network, orders: Orders, tell: Tell) -> None:
    settings = course.settings
    asked = schedule.requests(settings.seed, settings.requests)
    watching = asyncio.create_task(fleet.watch())
    try:
        tell("measuring what the fleet can serve")
        most = await _tokens_per_second(schedule.rush(asked), fleet, "-rush")
        asked = schedule.paced(asked, settings.load * most, settings.seconds_least)
        if settings.lost_capacity:
            asked = schedule.with_haste(asked)
        tell("undisturbed")
        calm = Load(asked, fleet.gateways, "-calm")
        course.calm = await calm.run()
        course.load_share = calm.tokens_per_second() / most
        if settings.lost_capacity:
            await _lose_all(course, asked, fleet, tell)
        else:
            load = Load(asked, fleet.gateways, "-chaos")
            course.disturbed = load.answers
            running = asyncio.create_task(load.run())
            striker = Striker(fleet, network, orders, running.done)
            await _strike_all(course, striker, load, running, tell)
            await running
        await fleet.wait_whole()
    finally:
        watching.cancel()


async def _tokens_per_second(asked: Sequence[Request], fleet: Fleet, suffix: str) -> float:
    load = Load(asked, fleet.gateways, suffix)
    await load.run()
    return load.tokens_per_second()


async def _strike_all(
    course: Course, striker: Striker, load: Load, running: asyncio.Task[list[Answer]], tell: Tell
) -> None:
    """One after the other: what a stream waits for is one loss, so that it may be compared with a target."""
    for number, fault in enumerate(schedule.faults(course.settings.seed, course.settings.kinds)):
        if number == course.settings.faults_most or running.done():
            return
        tell(f"fault {number + 1}: {fault.role} {fault.kind} {fault.point or ''}")
        struck = await striker.strike(fault)
        if struck is not None:
            course.struck.append(struck)
            await load.goes_on(struck.at_s)


async def _lose_all(course: Course, asked: Sequence[Request], fleet: Fleet, tell: Tell) -> None:
    """A part of the load for each loss; what failed is sent again when the fleet is whole."""
    losses = schedule.losses(course.settings.seed)[: course.settings.faults_most]
    for number, loss in enumerate(losses):
        tell(f"loss {number + 1}: {loss.name}")
        first, end = (len(asked) * edge // len(losses) for edge in (number, number + 1))
        load = Load(schedule.begun_now(asked[first:end]), fleet.gateways, "-lost")
        course.disturbed += load.answers
        running = asyncio.create_task(load.run())
        lost = await lose(fleet, loss, running.done)
        await running
        if lost is None:
            course.problems.append(f"{loss.name}: never too much ran for it: send more requests (--requests)")
            continue
        failed = [answer.request for answer in load.answers if answer.error]
        again = await Load(schedule.begun_now(failed), fleet.gateways, "-again").run()
        lost.answers, lost.again = load.answers, again
        course.lost.append(lost)


async def _settle(course: Course, fleet: Fleet, tell: Tell) -> None:
    """Every block becomes free; the accounts add up."""
    tell("waiting for every block")
    end_s = monotonic() + _FREE_S
    while True:
        accounts = await asyncio.to_thread(fleet.audits)
        held = {
            slot: [holding.sequence.request_id for holding in account.holdings]
            for slot, account in accounts.items()
            if account.blocks.free + account.blocks.sealed_cached != account.blocks.capacity
        }
        if not held:
            return
        if monotonic() > end_s:
            course.problems.append(f"blocks are still held after {_FREE_S:g} s: {held}")
            return
        await asyncio.sleep(0.2)
