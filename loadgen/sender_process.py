"""A process that sends: what the pool starts, several times, so that no single interpreter bends the times.

    started --connected--> Ready --Begin--> Progress ... Done --Begin--> ... --pipe closed or Stop--> ended

It does as it is told: Ctrl-C and SIGTERM, which a terminal or a service manager may give to all, are for the
pool to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from cluster.clock import monotonic
from cluster.errors import AnabranchError
from loadgen.drivers.interface import Ask, Driver
from loadgen.drivers.opening import open_driver
from loadgen.messages import Begin, Done, FromSender, Orders, Progress, Ready, Refused, ToSender
from loadgen.records import Record
from loadgen.sender import Counts, StageRun, Tools
from loadgen.workload import Origin, Segment

_PROGRESS_S = 0.25


def main(pipe: Connection[FromSender, ToSender], orders: Orders) -> None:
    """Serve the pool at the other end of the pipe until it closes it, or says Stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each request under way
    with contextlib.suppress(BrokenPipeError):  # the pool is gone: there is nobody to tell
        try:
            asyncio.run(_serve(pipe, orders))
        except AnabranchError as error:
            pipe.send(Refused(error.message))


async def _serve(pipe: Connection[FromSender, ToSender], orders: Orders) -> None:
    driver = open_driver(orders.target)
    try:
        await driver.endpoint()  # connects, and asks for nothing that would be measured
        prompt = orders.source.write((Segment(Origin.OWN, 0, 1),))
        driver.prepare(Ask("", prompt, 1))  # what is imported or built at the first use is there
        pipe.send(Ready())
        inbox = _Inbox(pipe)
        while isinstance(order := await inbox.next(), Begin):
            if not await _do(order, driver, pipe, orders, inbox):
                return
    finally:
        await driver.close()


async def _do(
    begin: Begin, driver: Driver, pipe: Connection[FromSender, ToSender], orders: Orders, inbox: _Inbox
) -> bool:
    """One stage; whether it came to its end without being stopped."""
    outbox = _Outbox(pipe)
    now_s = lambda: monotonic() - begin.origin_s  # noqa: E731
    tools = Tools(driver, orders.source, orders.run_id, now_s, outbox.keep, outbox.counts)
    began_s, began_cpu_s = monotonic(), time.process_time()
    doing = asyncio.create_task(StageRun(tools, orders.stages[begin.stage], begin.begins_s).run())
    telling = asyncio.create_task(outbox.tell())
    stopping = asyncio.create_task(inbox.next())
    await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopped = stopping.done()
    doing.cancel()
    stopping.cancel()
    await asyncio.wait((doing, stopping))
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)
    if not doing.cancelled():
        doing.result()  # a bug ends the process, aloud
    await outbox.flush()
    wall_s = max(monotonic() - began_s, _PROGRESS_S)
    pipe.send(Done((time.process_time() - began_cpu_s) / wall_s))
    return not stopped


class _Outbox:
    """Records on their way to the pool, a few times a second, by a thread: the pipe may be full."""

    def __init__(self, pipe: Connection[FromSender, ToSender]) -> None:
        self._pipe = pipe
        self._kept: list[Record] = []
        self._writing = asyncio.Lock()
        self.counts = Counts()
        self.keep: Callable[[Record], None] = self._kept.append

    async def tell(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_PROGRESS_S)
            await asyncio.shield(self.flush())

    async def flush(self) -> None:
        """Send what there is."""
        async with self._writing:
            records = tuple(self._kept)
            self._kept.clear()
            progress = Progress(records, self.counts.sent, self.counts.under_way)
            await asyncio.to_thread(self._pipe.send, progress)


class _Inbox:
    """Orders as they come; the pipe's end is one as well."""

    def __init__(self, pipe: Connection[FromSender, ToSender]) -> None:
        self._pipe = pipe
        self._orders: asyncio.Queue[ToSender | None] = asyncio.Queue(3)  # Begin, Stop, the end
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read)

    async def next(self) -> ToSender | None:
        """The next order; None where the pool is gone."""
        return await self._orders.get()

    def _read(self) -> None:
        try:
            self._orders.put_nowait(self._pipe.recv())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            self._orders.put_nowait(None)
