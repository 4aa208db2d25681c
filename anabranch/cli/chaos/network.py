"""The network between the processes of one machine: everything they say to each other over gRPC goes through
a proxy, so that a process can be cut off as a pulled cable would, and connected again, without root.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

_PIECE_BYTES = 64 * 1024
_CLOSE_S = 5.0

Target = Callable[[], tuple[int, str] | None]
"""(process id, host:port) that a connection made now leads to; None while nobody is there."""


class Network:
    """Owns a thread with an event loop, a listener for each way, and who is cut off.

    A way leads from one process to another; 0 is whoever is outside, the clients and the controller. What is
    in flight between two processes while either is cut off arrives when both are connected again; a
    connection made meanwhile is accepted and hears nothing.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._connected = asyncio.Condition()
        self._cut: set[int] = set()
        self._lock = threading.Lock()
        self._ports: dict[tuple[int, int, str], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    def way(self, viewer: int, target: int, address: str) -> str:
        """The address at which process `viewer` reaches process `target`, which listens at `address`."""
        key = viewer, target, address
        with self._lock:
            if key not in self._ports:
                self._ports[key] = self.listen(viewer, lambda: (target, address))
            return f"127.0.0.1:{self._ports[key]}"

    def listen(self, viewer: int | list[int], target: Target) -> int:
        """A new port that leads wherever `target` says at each connection."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._run(self._serve(listener, viewer, target)).result(_CLOSE_S)
        return int(listener.getsockname()[1])

    def listen_for(self, viewer: list[int], address: str) -> int:
        """A new port that leads outside, for a process that is about to start; `viewer` will hold its id."""
        return self.listen(viewer, lambda: (0, address))

    def cut(self, process_id: int) -> None:
        """Nothing reaches or leaves this process from now on."""
        self._run(self._set(process_id, is_cut=True)).result(_CLOSE_S)

    def heal(self, process_id: int) -> None:
        """Connect it again."""
        self._run(self._set(process_id, is_cut=False)).result(_CLOSE_S)

    def close(self) -> None:
        """End every connection and the thread."""
        self._run(self._cancel()).result(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _set(self, process_id: int, *, is_cut: bool) -> None:
        async with self._connected:
            if is_cut:
                self._cut.add(process_id)
            else:
                self._cut.discard(process_id)
                self._connected.notify_all()

    async def _cancel(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, listener: socket.socket, viewer: int | list[int], target: Target) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                await self._join(viewer, target, reader, writer)
            except asyncio.CancelledError:
                return  # the network ends
            finally:
                self._tasks.discard(task)
                writer.close()

        self._servers.append(await asyncio.start_server(connected, sock=listener, limit=_PIECE_BYTES))

    async def _join(
        self,
        viewer: int | list[int],
        target: Target,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        found = target()
        if found is None:
            return
        process_id, address = found
        known = viewer if isinstance(viewer, int) else viewer[0]
        pair = frozenset((known, process_id))
        await self._open(pair)
        host, _, port = address.rpartition(":")
        try:
            their_reader, their_writer = await asyncio.open_connection(host, int(port), limit=_PIECE_BYTES)
        except OSError:
            return  # nobody listens: hung up on
        ways = [
            asyncio.ensure_future(self._pump(pair, reader, their_writer)),
            asyncio.ensure_future(self._pump(pair, their_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await self._open(pair)  # also the end of a connection is news, which a cut keeps back
        finally:
            for way in ways:
                way.cancel()
            their_writer.close()

    async def _pump(
        self, pair: frozenset[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                await self._open(pair)
                writer.write(piece)
                await writer.drain()

    async def _open(self, pair: frozenset[int]) -> None:
        """Until neither side is cut off."""
        if self._cut.isdisjoint(pair):
            return
        async with self._connected:
            await self._connected.wait_for(lambda: self._cut.isdisjoint(pair))
