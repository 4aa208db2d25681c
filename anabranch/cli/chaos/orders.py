"""The listener's side of `cluster.fault_points`: which armed processes there are, and what they are told."""

from __future__ import annotations

import asyncio
from pathlib import Path

_SAY_S = 5.0


class Orders:
    """Owns the socket that armed processes connect to, by process id. Belongs to one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._server: asyncio.Server | None = None
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._readers: set[asyncio.Task[None]] = set()
        self._reached: dict[int, asyncio.Queue[str]] = {}

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, self.path)

    async def close(self) -> None:
        """Hang up: whoever is held goes on."""
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers.values()):
            writer.close()
        await asyncio.gather(*self._readers)

    async def hold(self, process_id: int, point: str, within_s: float) -> bool:
        """Ask a process to stop at a point; whether it got there in time. If not, the order is taken back."""
        reached = self._reached[process_id] = asyncio.Queue()
        await self._say(process_id, f"hold {point}")
        try:
            async with asyncio.timeout(within_s):
                await reached.get()
        except TimeoutError:
            self.go(process_id)
            return False
        return True

    def go(self, process_id: int) -> None:
        """Let a held process go on; nothing where it is gone."""
        writer = self._writers.get(process_id)
        if writer is not None:
            writer.write(b"go\n")

    async def _say(self, process_id: int, line: str) -> None:
        writer = self._writers.get(process_id)
        if writer is not None:
            writer.write(f"{line}\n".encode())

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeting = (await reader.readline()).decode().split()
        if len(greeting) != 2:  # a role that was killed while it connected
            writer.close()
            return
        process_id = int(greeting[1])
        self._writers[process_id] = writer
        try:
            while line := await reader.readline():
                word, _, point = line.decode().strip().partition(" ")
                if word == "reached" and process_id in self._reached:
                    self._reached[process_id].put_nowait(point)
        except OSError:
            return
        finally:
            self._writers.pop(process_id, None)
            writer.close()
