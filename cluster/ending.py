"""How a process of ours ends."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process without tearing the interpreter down.

    All of ours is closed by then. Collecting torch's modules at exit takes seconds on a busy machine, and
    threads of libraries that meet a dying interpreter may hold it for ever, or abort it: a process that was
    told to stop must be gone, with the status it means.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)
