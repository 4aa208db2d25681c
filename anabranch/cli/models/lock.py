"""One process at a time: an advisory lock on a file, waited for with a deadline."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import DeadlineExceeded


@contextmanager
def exclusive(path: Path, deadline_s: float, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on `path` (created, never deleted: deleting it would let two processes in).

    The kernel releases it when the holder dies. `on_wait` is called once if somebody else holds it.
    Raises `DeadlineExceeded` after `deadline_s` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not _try_lock(descriptor):
            on_wait()
            _wait_for_lock(descriptor, path, deadline_s)
        yield
    finally:
        os.close(descriptor)  # and with it goes the lock, or the wait for it


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_for_lock(descriptor: int, path: Path, deadline_s: float) -> None:
    """flock knows no deadline, so a thread waits; given up, it ends with the holder or this process."""
    waiting = threading.Thread(target=fcntl.flock, args=(descriptor, fcntl.LOCK_EX), daemon=True)
    waiting.start()
    waiting.join(deadline_s)
    if waiting.is_alive():
        raise DeadlineExceeded(f"another process has held {path} for {deadline_s:.0f} s; end it or try later")
