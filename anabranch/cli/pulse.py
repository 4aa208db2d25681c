"""A sign of life from what takes long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PULSE_S = 2.0
"""Nothing that takes longer is silent."""


@contextmanager
def pulse(say: Callable[[float], None], every_s: float = PULSE_S) -> Iterator[None]:
    """While entered, call `say` with the seconds passed, every `every_s`, on a thread of its own."""
    over = threading.Event()
    began_s = time.monotonic()

    def run() -> None:
        while not over.wait(every_s):
            say(time.monotonic() - began_s)

    thread = threading.Thread(target=run, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
