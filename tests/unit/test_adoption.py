"""Which processes a controller takes over from the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.adoption import filled, keeper_name
from controller.keeper import Held, Launch, Started
from controller.slots import Phase, Slot

SLOT = Slot("dense-0", "dense", 0)
OTHER = Slot("dense-01", "dense", 1)
LAUNCH = Launch("dense-0", ("python", "--controller", "here:1"), "config", "logs")
HELD = Held(LAUNCH, Started(7, "host", "logs/dense-0.log"), "node-a")


def fill(held: dict[str, Held | None], launch: Launch = LAUNCH, *, may_move: bool = False) -> Slot:
    """The first slot, when all would be started so now."""
    return filled((SLOT, OTHER), held, lambda _slot: launch, may_move=may_move)[0]


def test_the_process_of_the_last_attempt_is_taken_over() -> None:
    """It is where its keeper says, and has yet to say that it serves; other slots' names do not count."""
    slot = fill({"dense-0.2": replace(HELD, node="node-b"), "dense-0.10": HELD, "dense-01.11": HELD})
    assert keeper_name(slot) == "dense-0.10"
    assert (slot.phase, slot.node, slot.process_id) == (Phase.STARTING, "node-a", 7)
    assert slot.log_file == HELD.started.log_file


def test_an_empty_slot_counts_on() -> None:
    """The name of the next attempt was never used; what an earlier attempt left is not this slot's."""
    assert fill({}) == SLOT
    assert fill({"dense-0.3": None, "dense-0.2": HELD}) == replace(SLOT, attempt=3)


@pytest.mark.parametrize(
    ("now", "may_move", "is_kept"),
    [
        (replace(LAUNCH, config_text="another"), True, False),
        (replace(LAUNCH, command=("python", "--controller", "there:1")), False, False),
        (replace(LAUNCH, command=("python", "--controller", "there:1")), True, True),
    ],
)
def test_only_what_would_be_started_so_is_kept(now: Launch, may_move: bool, is_kept: bool) -> None:
    """Another configuration is not, nor is a process that would not look for this controller."""
    assert fill({"dense-0.1": HELD}, now, may_move=may_move).has_process == is_kept
