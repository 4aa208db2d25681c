"""How fast an engine under test goes."""

from __future__ import annotations

import contextlib
import threading
import unittest.mock
from collections.abc import Iterator

from workers.dense.engine import Engine


@contextlib.contextmanager
def slowly(engine: Engine) -> Iterator[None]:
    """Each of an engine's steps takes 20 ms longer, so that what is to happen while it decodes comes before
    its sequences end, on a busy machine too.
    """
    turn = engine.turn

    def late_turn() -> bool:
        threading.Event().wait(0.02)
        return turn()

    with unittest.mock.patch.object(engine, "turn", late_turn):
        yield
