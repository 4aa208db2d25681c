"""The gateway's computing, kept off its event loop: tokenizing, templates, replaying a resumed text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from cluster.errors import ResourceExhausted

_THREADS = 2
_PENDING_MAX = 256

T = TypeVar("T")


class TextWork:
    """A few threads, and a bound on how much waits for them. `Tokenizer` releases the interpreter lock."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")
        self._pending = 0

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on a thread. Raises ResourceExhausted when too much waits already."""
        if self._pending >= _PENDING_MAX:
            raise ResourceExhausted(f"{_PENDING_MAX} texts wait to be tokenized already: back off")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """End the threads; what waits is given up."""
        self._executor.shutdown(wait=False, cancel_futures=True)
