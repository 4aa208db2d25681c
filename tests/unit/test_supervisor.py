"""Supervision, on a clock that moves only when told and with hands that only take notes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from cluster.clock import ManualClock
from cluster.errors import ConfigError, InvalidRequest, NotFound, Unavailable, Unplaceable
from controller.slots import Limits, NotPlaced, Phase, Placed, Slot
from controller.supervisor import EXIT_REFUSED, Supervisor

LIMITS = Limits(placement_timeout_s=30, start_timeout_s=120, restart_backoff_s=0.5, restarts_most=3)
SLOTS = (Slot("attention-0", "attention", 0), Slot("dense-0", "dense", 0), Slot("gateway-0", "gateway", 0))


class Hands:
    """Notes what it is told to do."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str, float]] = []

    def launch(self, slot: Slot) -> None:
        """Note a launch, with its attempt."""
        self.done.append(("launch", slot.worker_id, slot.attempt))

    def terminate(self, slot: Slot, grace_s: float) -> None:
        """Note a termination, with its grace."""
        self.done.append(("terminate", slot.worker_id, grace_s))

    def abandon(self, slot: Slot) -> None:
        """Note an abandonment, with its attempt."""
        self.done.append(("abandon", slot.worker_id, slot.attempt))

    def take(self) -> list[tuple[str, str, float]]:
        """What was done since the last call."""
        done, self.done = self.done, []
        return done


class Fleet:
    """A supervisor over nodes that are switched off and on by name."""

    def __init__(self, slots: Sequence[Slot] = SLOTS, limits: Limits = LIMITS) -> None:
        self.clock = ManualClock()
        self.hands = Hands()
        self.nodes = ["node-a", "node-b"]
        self.missing = ""
        self.room = 100
        self.supervisor = Supervisor(slots, limits, self.place, self.hands, clock=self.clock)

    def place(
        self, waiting: Sequence[Slot], occupied: Sequence[Slot], suspected: frozenset[str]
    ) -> Mapping[str, Placed | NotPlaced]:
        """The first node not suspected, for as many as fit, unless something is said to be missing."""
        nodes = [node for node in self.nodes if node not in suspected]
        if self.missing or not nodes:
            return {slot.worker_id: NotPlaced(self.missing or "no node") for slot in waiting}
        fitting = max(0, self.room - len(occupied))
        found: dict[str, Placed | NotPlaced] = {
            slot.worker_id: Placed(nodes[0]) for slot in waiting[:fitting]
        }
        return found | {slot.worker_id: NotPlaced("no room") for slot in waiting[fitting:]}

    def pass_time(self, seconds: float) -> None:
        """Tick as the controller does."""
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            self.clock.advance(0.1)
            self.supervisor.tick()

    def slot(self, worker_id: str = "dense-0") -> Slot:
        """A slot as it stands."""
        return next(slot for slot in self.supervisor.slots if slot.worker_id == worker_id)

    def start_all(self) -> None:
        """Launch everything and let it become ready."""
        self.supervisor.tick()
        for slot in self.supervisor.slots:
            self.supervisor.started(slot.worker_id, slot.attempt, 100, "log")
            self.supervisor.ready(slot.worker_id)
        self.hands.take()


def test_everything_is_launched_once_and_becomes_ready() -> None:
    """Each slot gets one process; the cluster is ready when all of them are."""
    fleet = Fleet()
    fleet.pass_time(1.0)
    assert fleet.hands.take() == [("launch", slot.worker_id, 1) for slot in SLOTS]
    for slot in SLOTS:
        assert not fleet.supervisor.is_ready
        fleet.supervisor.ready(slot.worker_id)
    assert fleet.supervisor.is_ready
    assert fleet.supervisor.failure(was_complete=False) is None


def test_a_dead_process_is_started_again_after_a_pause() -> None:
    """The same slot, the next attempt, not before the backoff, and the problem is on record."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.ended("dense-0", 1, 1, "last words")
    assert fleet.slot().phase is Phase.PAUSED
    assert fleet.slot().problem == "ended with status 1: last words"
    fleet.pass_time(0.3)
    assert fleet.hands.take() == []
    fleet.pass_time(1.0)
    assert fleet.hands.take() == [("launch", "dense-0", 2)]


def test_a_killed_process_has_no_last_words() -> None:
    """What it logged before has nothing to do with its end."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.ended("dense-0", 1, -9, "all is well")
    assert fleet.slot().problem == "ended by SIGKILL"


def test_pauses_grow_and_a_slot_that_never_starts_is_given_up() -> None:
    """Failures in a row wait longer each time; after max_restarts the slot is left alone."""
    fleet = Fleet(SLOTS[1:2])
    starts: list[float] = []
    for attempt in range(1, LIMITS.restarts_most + 2):
        while not fleet.hands.take():
            fleet.pass_time(0.1)
        starts.append(fleet.clock.now_s)
        fleet.supervisor.ended("dense-0", attempt, 1, "no luck")
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 2.0
    assert fleet.slot().phase is Phase.GIVEN_UP
    fleet.pass_time(100.0)
    assert fleet.hands.take() == []
    failure = fleet.supervisor.failure(was_complete=False)
    assert isinstance(failure, Unavailable)
    assert "no luck" in failure.message


def test_a_refused_configuration_is_not_tried_again() -> None:
    """Exit status 2 says that starting again would not help: its last line becomes the error."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.ended("dense-0", 1, EXIT_REFUSED, "dense: no such model")
    failure = fleet.supervisor.failure(was_complete=False)
    assert isinstance(failure, ConfigError)
    assert "no such model" in failure.message


def test_a_role_may_run_short_of_processes_but_not_out_of_them() -> None:
    """Once the cluster served, it ends only when no process of some role can come back."""
    fleet = Fleet((*SLOTS, Slot("dense-1", "dense", 1)))
    fleet.start_all()
    fleet.supervisor.ended("dense-1", 1, EXIT_REFUSED, "")
    assert fleet.supervisor.failure(was_complete=True) is None
    fleet.supervisor.ended("dense-0", 1, EXIT_REFUSED, "")
    assert fleet.supervisor.failure(was_complete=True) is not None


def test_old_failures_are_forgotten_by_a_process_that_lasts() -> None:
    """A process that served for a while starts with a clean record."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.ended("dense-0", 1, 1, "")
    fleet.pass_time(1.0)
    fleet.supervisor.ready("dense-0")
    assert fleet.slot().failures == 1
    fleet.pass_time(31.0)
    assert fleet.slot().failures == 0


def test_a_silent_member_is_killed_and_replaced() -> None:
    """Silence is answered by a kill, and the kill by a new start."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.silent("dense-0")
    assert fleet.hands.take() == [("terminate", "dense-0", 0.0)]
    fleet.supervisor.ended("dense-0", 1, -9, "")
    assert "no sign of life" in fleet.slot().problem
    fleet.pass_time(1.0)
    assert fleet.hands.take() == [("launch", "dense-0", 2)]


def test_a_node_that_does_not_answer_is_avoided() -> None:
    """If the kill is not reported in time the keeper is abandoned and the next node is tried."""
    fleet = Fleet()
    fleet.start_all()
    assert fleet.slot().node == "node-a"
    fleet.supervisor.silent("dense-0")
    fleet.pass_time(5.0)
    assert ("abandon", "dense-0", 1) in fleet.hands.take()
    assert fleet.slot().attempt == 2
    assert fleet.slot().node == "node-b"


def test_a_lost_node_moves_its_slots_at_once() -> None:
    """What ran on a node that died is placed elsewhere without a pause, though Ray still lists the node."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.lost("dense-0", 1, "the node died")
    fleet.pass_time(0.7)
    assert fleet.slot().node == "node-b"
    assert fleet.hands.take() == [("launch", "dense-0", 2)]


def test_news_of_an_earlier_attempt_is_ignored() -> None:
    """An end reported late does not end the successor."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.lost("dense-0", 1, "gone")
    fleet.pass_time(0.7)
    fleet.supervisor.ended("dense-0", 1, 0, "")
    assert fleet.slot().phase is Phase.STARTING
    assert fleet.slot().attempt == 2


def test_a_slot_no_node_can_hold_fails_the_start_by_name() -> None:
    """After placement.timeout_s the start fails, naming slot and missing resource; not before."""
    fleet = Fleet()
    fleet.missing = "needs GPU: 1 of type H100"
    fleet.pass_time(29.0)
    assert fleet.supervisor.failure(was_complete=False) is None
    fleet.pass_time(2.0)
    failure = fleet.supervisor.failure(was_complete=False)
    assert isinstance(failure, Unplaceable)
    assert "attention-0" in failure.message
    assert "needs GPU: 1 of type H100" in failure.message


def test_a_slot_waits_for_a_node_to_come() -> None:
    """A node that joins in time ends the wait."""
    fleet = Fleet()
    fleet.missing = "needs 8 GiB"
    fleet.pass_time(5.0)
    fleet.missing = ""
    fleet.pass_time(0.7)
    assert len(fleet.hands.take()) == len(SLOTS)


def test_a_process_that_is_never_ready_is_replaced() -> None:
    """start_timeout_s bounds the wait for READY."""
    fleet = Fleet(SLOTS[1:2])
    fleet.pass_time(0.2)
    fleet.hands.take()
    fleet.pass_time(LIMITS.start_timeout_s + 0.2)
    assert fleet.hands.take() == [("terminate", "dense-0", 0.0)]
    assert "not ready within 120 s" in fleet.slot().problem


def test_the_drain_goes_from_the_gateways_inwards() -> None:
    """Each role is told to stop when the one that needs it has, and the grace is shared."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.drain(10.0)
    assert fleet.hands.take() == [("terminate", "gateway-0", 10.0)]
    fleet.pass_time(4.0)
    assert fleet.hands.take() == []
    fleet.supervisor.ended("gateway-0", 1, 0, "")
    fleet.pass_time(0.1)
    ((_, name, grace_s),) = fleet.hands.take()
    assert name == "dense-0"
    assert grace_s == pytest.approx(6.0, abs=0.2)
    fleet.supervisor.ended("dense-0", 1, 0, "")
    fleet.pass_time(0.1)
    assert [done[:2] for done in fleet.hands.take()] == [("terminate", "attention-0")]
    fleet.supervisor.ended("attention-0", 1, 0, "")
    assert fleet.supervisor.is_stopped
    assert fleet.supervisor.killed == 0


def test_a_drain_stops_what_only_waits_and_starts_nothing() -> None:
    """Slots without a process are stopped at once, also when they wait for their turn."""
    fleet = Fleet()
    fleet.missing = "no node"
    fleet.pass_time(1.0)
    fleet.supervisor.drain(10.0)
    fleet.missing = ""
    fleet.pass_time(1.0)
    assert fleet.supervisor.is_stopped
    assert fleet.hands.take() == []


def test_a_drain_without_grace_kills_everything_at_once() -> None:
    """Also when it comes while an earlier drain waits."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.drain(60.0)
    fleet.hands.take()
    fleet.supervisor.drain(0.0)
    assert fleet.hands.take() == [("terminate", slot.worker_id, 0.0) for slot in SLOTS]
    for slot in SLOTS:
        fleet.supervisor.ended(slot.worker_id, 1, -9, "")
    assert fleet.supervisor.is_stopped
    assert fleet.supervisor.killed == len(SLOTS)


def test_a_drain_ends_even_if_a_node_does_not_answer() -> None:
    """What does not report its end is abandoned after its grace, and counted as killed."""
    fleet = Fleet()
    fleet.start_all()
    fleet.supervisor.drain(1.0)
    fleet.pass_time(30.0)
    assert fleet.supervisor.is_stopped
    assert fleet.supervisor.killed == len(SLOTS)


def test_a_worker_that_retires_is_not_started_again() -> None:
    """It gets SIGTERM and its time; its slot stays empty, the cluster counts as whole, and a role's last one
    is not let go.
    """
    slots = (*SLOTS, Slot("attention-1", "attention", 1))
    fleet = Fleet(slots)
    fleet.start_all()
    fleet.supervisor.retire("attention-1", 20.0)
    fleet.supervisor.retire("attention-1", 20.0)  # again changes nothing
    assert fleet.hands.take() == [("terminate", "attention-1", 20.0)]
    fleet.supervisor.ended("attention-1", 1, 0, "")
    fleet.pass_time(60)
    assert fleet.hands.take() == []
    assert (fleet.slot("attention-1").phase, fleet.slot("attention-1").problem) == (Phase.STOPPED, "")
    assert fleet.supervisor.is_ready
    assert fleet.supervisor.failure(was_complete=True) is None
    with pytest.raises(InvalidRequest, match="last attention"):
        fleet.supervisor.retire("attention-0", 20.0)
    with pytest.raises(NotFound, match="attention-7"):
        fleet.supervisor.retire("attention-7", 20.0)


@pytest.mark.parametrize("is_heard", [True, False])
def test_a_worker_that_does_not_retire_in_time_is_given_up(is_heard: bool) -> None:
    """Killed by its keeper, or abandoned with its node: it is not started again, and the slot says how."""
    fleet = Fleet((*SLOTS, Slot("dense-1", "dense", 1)))
    fleet.start_all()
    fleet.supervisor.retire("dense-1", 5.0)
    if is_heard:
        fleet.supervisor.ended("dense-1", 1, -9, "")
    fleet.pass_time(10)
    assert fleet.slot("dense-1").problem == ("ended by SIGKILL" if is_heard else "did not end in time")
    assert fleet.slot("dense-1").phase is Phase.STOPPED
    assert [what for what, _, _ in fleet.hands.take()] == ["terminate", *([] if is_heard else ["abandon"])]


def test_an_empty_slot_retires_at_once() -> None:
    """What only waits for a node is struck off."""
    fleet = Fleet((*SLOTS, Slot("dense-1", "dense", 1)))
    fleet.missing = "memory"
    fleet.supervisor.tick()
    fleet.supervisor.retire("dense-1", 5.0)
    assert fleet.slot("dense-1").phase is Phase.STOPPED
    assert fleet.hands.take() == []


def test_an_elastic_cluster_has_as_many_workers_as_its_nodes_hold() -> None:
    """It is ready without those that no node holds, but not without a whole role; a worker that retired
    leaves its slot to the next node once its own had time to leave, and the last one of a role stays.
    """
    slots = (*SLOTS, *(Slot(f"dense-{index}", "dense", index) for index in (1, 2)))
    fleet = Fleet(slots, replace(LIMITS, elastic=True))
    fleet.room = 2
    fleet.pass_time(40)
    assert isinstance(fleet.supervisor.failure(was_complete=False), Unplaceable)
    fleet.room = 4
    fleet.pass_time(1)
    assert fleet.supervisor.failure(was_complete=False) is None
    assert not fleet.supervisor.is_ready
    for worker_id in ("attention-0", "dense-0", "gateway-0", "dense-1"):
        fleet.supervisor.ready(worker_id)
    assert fleet.supervisor.is_ready
    assert fleet.slot("dense-2").problem == "no room"
    fleet.hands.take()
    fleet.supervisor.retire("dense-0", 20.0)
    fleet.supervisor.ended("dense-0", 1, 0, "")
    fleet.room = 3
    with pytest.raises(InvalidRequest, match="last dense"):
        fleet.supervisor.retire("dense-1", 20.0)
    fleet.pass_time(59)
    assert fleet.slot("dense-0").phase is Phase.STOPPED
    fleet.pass_time(2)
    fleet.room = 5
    fleet.pass_time(1)
    assert {(what, worker_id) for what, worker_id, _ in fleet.hands.take()} == {
        ("terminate", "dense-0"),
        ("launch", "dense-0"),
        ("launch", "dense-2"),
    }
