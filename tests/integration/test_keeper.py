"""A keeper, without Ray: whose it is, and what it then tells."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import AlreadyExists, Fenced
from controller.keeper import PYTHON_PLACE, Keeper, Launch

SILENCE_S = 0.05


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """A process that waits to be ended."""
    command = (PYTHON_PLACE, "-c", "import signal; signal.pause()")
    return Launch("dense-0", command, "", str(tmp_path))


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """One of controller A, which takes its process along."""
    keeper = Keeper("A", "node")
    yield keeper
    for controller in ("A", "B"):
        try:
            keeper.terminate(controller, 0.0)
        except Fenced:
            continue


def test_a_silent_controller_is_replaced_and_fenced(keeper: Keeper, launch: Launch) -> None:
    """The next controller is told what runs where, and the end; the one before hears and orders nothing."""
    started = keeper.start(launch)
    assert keeper.wait("A", 0.0) is None
    held = keeper.adopt("B", SILENCE_S)
    assert held is not None
    assert (held.launch, held.started, held.node) == (launch, started, "node")
    for refused in (keeper.wait, keeper.terminate):
        with pytest.raises(Fenced):
            refused("A", 0.0)
    keeper.terminate("B", 0.0)
    ended = keeper.wait("B", 5.0)
    assert ended is not None
    assert ended.status == -signal.SIGKILL


def test_a_controller_that_waits_keeps_its_process(keeper: Keeper) -> None:
    """A sign of life while another one asks refuses that one, at once."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(keeper.adopt, "B", 30.0)
        while not asked.done():
            keeper.wait("A", 0.001)
        with pytest.raises(AlreadyExists):
            asked.result()


def test_nothing_is_held_before_the_start_and_after_the_end(launch: Launch) -> None:
    """Whoever adopts a keeper then learns that its slot is empty."""
    assert Keeper("A", "node").adopt("B", SILENCE_S) is None
    keeper = Keeper("A", "node")
    keeper.start(launch)
    keeper.terminate("A", 0.0)
    assert keeper.wait("A", 5.0) is not None
    assert keeper.adopt("B", SILENCE_S) is None
