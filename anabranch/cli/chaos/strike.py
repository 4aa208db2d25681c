"""Carrying out one fault: choose the victim, wait for the moment, strike, and let it come back if it may."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from anabranch.cli.chaos.fleet import Fleet, Life, send
from anabranch.cli.chaos.network import Network
from anabranch.cli.chaos.orders import Orders
from anabranch.cli.chaos.schedule import Fault
from cluster.perfmodel import Line

_POINT_S = 5.0
"""Longest wait for a process at work to reach a named point."""

LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that happened: to whom, when (monotonic), and how busy the victim said it was."""

    fault: Fault
    slot: str
    at_s: float
    streams: int
    at_point: bool
    replaced: bool
    whole_again_s: float
    """Seconds until the fleet was whole."""
    step: Line
    """What a step of prompts took before, by its tokens."""


class Striker:
    """Strikes processes of a fleet, one at a time."""

    def __init__(self, fleet: Fleet, network: Network, orders: Orders, is_over: Callable[[], bool]) -> None:
        """`is_over`: whether the load is, so that nobody is worth striking any more."""
        self._fleet = fleet
        self._network = network
        self._orders = orders
        self._is_over = is_over

    async def strike(self, fault: Fault) -> Struck | None:
        """Strike, and wait until the fleet is whole again. None when the load ended before.

        A victim must have an open stream; at a named point it is at work on one by being there.
        """
        while not self._is_over():
            found = self._busy(fault)
            if found is None:
                await asyncio.sleep(LOOK_S)
                continue
            life, streams = found
            if fault.point is None or await self._orders.hold(life.process_id, fault.point, _POINT_S):
                return await self._hit(fault, life, streams)
        return None

    async def _hit(self, fault: Fault, life: Life, streams: int) -> Struck:
        life.struck, life.returned_s = True, None
        step = _step(self._fleet)
        at_s = monotonic()
        if fault.kind == "kill":
            send(life, signal.SIGKILL)
            await asyncio.to_thread(life.process.wait)
        elif fault.kind == "freeze":
            send(life, signal.SIGSTOP)
        else:
            self._network.cut(life.process_id)
        self._orders.go(life.process_id)
        if fault.kind != "kill":
            await self._last(fault, life, at_s)
            self._let_go(fault, life)
        await asyncio.sleep(LOOK_S)
        self._fleet.look()  # a killed one's slot is empty before anybody noticed
        await self._fleet.wait_whole()
        replaced = not self._fleet.is_current(life)
        life.struck = replaced
        whole_again_s = monotonic() - at_s
        return Struck(fault, life.slot, at_s, streams, fault.point is not None, replaced, whole_again_s, step)

    async def _last(self, fault: Fault, life: Life, at_s: float) -> None:
        """While the victim stays away: some time, or until its successor serves."""
        if fault.lasts_s is not None:
            await asyncio.sleep(max(0.0, at_s + fault.lasts_s - monotonic()))
            return
        await self._fleet.wait(lambda: not self._fleet.is_current(life) and self._fleet.serves(life.slot))

    def _let_go(self, fault: Fault, life: Life) -> None:
        if fault.kind == "freeze":
            send(life, signal.SIGCONT)
        else:
            self._network.heal(life.process_id)
        life.returned_s = monotonic()

    def _busy(self, fault: Fault) -> tuple[Life, int] | None:
        """A process of the role with open streams, by what it last reported, and how many."""
        lives = [(life, open_streams(self._fleet, life)) for life in self._fleet.living(fault.role)]
        busy = [(life, streams) for life, streams in lives if streams > 0]
        return busy[fault.slot % len(busy)] if busy else None


def _step(fleet: Fleet) -> Line:
    """What steps take at the slowest dense worker, as they said last; attention over contexts so short is in
    the base.
    """
    members = filter(None, map(fleet.member, fleet.living("dense")))
    times = [member.load.step_times for member in members if member.load.HasField("step_times")]
    return Line(
        max((each.dense_base_s + each.attention_base_s for each in times), default=0.0),
        max((each.dense_row_s for each in times), default=0.0),
    )


def open_streams(fleet: Fleet, life: Life) -> int:
    """How busy a process last said it is: streams, running sequences, or blocks in use."""
    member = fleet.member(life)
    if member is None:
        return 0
    load = member.load
    if life.role == "gateway":
        return load.streams_open
    if life.role == "dense":
        return load.sequences_running
    return load.blocks.capacity - load.blocks.free - load.blocks.sealed_cached
