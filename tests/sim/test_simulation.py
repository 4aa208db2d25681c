"""The simulation itself: it repeats, it notices what it is there to notice, and its seeds hold."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import inf

import pytest

from cluster.types import Epoch, Generation, SequenceKey, ShardId, ShardRef, WorkerId
from tests.sim.simulation import Simulation
from tests.sim.watch import Violation, Watch
from workers.attention.store import Store
from workers.dense.deltas import Delta, Subscriber
from workers.dense.engine import Engine
from workers.dense.sequences import Submission
from workers.lanes.messages import PlanRow

SEEDS = "0:60"


def _story(seed: int) -> list[str]:
    simulation = Simulation(seed)
    simulation.run()
    return simulation.world.journal


def test_a_seed_repeats() -> None:
    """Two runs of a seed tell the same story."""
    assert _story(5) == _story(5)


def test_a_wrong_value_in_a_cache_is_noticed() -> None:
    """Cached values change under a running request: its next token is called wrong."""
    simulation = Simulation(3)
    before = simulation.world.check

    def spoil() -> None:
        before()
        for worker in simulation.attention.values():
            if worker.store.blocks_held():
                worker.arena.layer(0).value.add_(1.0)

    simulation.world.check = spoil
    with pytest.raises(Violation, match=r"token \d+ is \d+, not"):
        simulation.run()


def test_a_block_that_is_not_given_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that let no lease run out keep what nobody released."""
    monkeypatch.setattr(Store, "expire", lambda _store: ())
    monkeypatch.setattr(Store, "release", lambda *_arguments: 0)
    with pytest.raises(Violation, match="still held"):
        Simulation(3).run()


def test_a_deadline_that_a_dense_worker_lets_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are told of no deadline go on behind it."""
    submit = Engine.submit

    def without(engine: Engine, submission: Submission, subscriber: Subscriber, timeout_s: float) -> None:
        submit(engine, replace(submission, deadline_s=inf), subscriber, timeout_s)

    monkeypatch.setattr(Engine, "submit", without)
    with pytest.raises(Violation, match="let its deadline pass"):
        Simulation(2).run()


def test_an_append_before_its_map_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateways' streams carry no map."""
    monkeypatch.setattr(Watch, "tells", lambda *_arguments: None)
    with pytest.raises(Violation, match="in no map that it sent"):
        Simulation(3).run()


def test_a_second_writer_and_a_map_with_an_overlap_are_noticed() -> None:
    """Two lives of dense workers write a shard under one generation; two shards have the same positions."""
    watch, key = Watch(), SequenceKey("r0")
    shards = [
        ShardRef(WorkerId("attention-0"), Epoch(1), ShardId(number), 8 * number, 8 * number + 9)
        for number in range(2)
    ]
    row = PlanRow(ShardId(0), Generation(1), 0, 1, 0, 0, token_ids=(5,))
    for dense in ("dense-0@1", "dense-0@2"):
        watch.tells(dense, Delta(key, 1, 0, shard_map=(shards[0],)))
    watch.writes("dense-0@1", "attention-0@1", [row])
    watch.writes("dense-0@2", "attention-0@1", [replace(row, generation=Generation(2))])
    with pytest.raises(Violation, match=r"dense-0@2 writes .* of dense-0@1"):
        watch.writes("dense-0@2", "attention-0@1", [row])
    with pytest.raises(Violation, match="begins before 9"):
        watch.tells("dense-0@1", Delta(key, 1, 0, shard_map=tuple(shards)))


def test_a_worker_that_was_frozen_goes_on_or_ends() -> None:
    """Within the expiry it goes on as the same life; beyond, it ends, and its slot has another one."""
    simulation = Simulation(1)

    def lives() -> Iterator[str]:
        return (worker.life for worker in simulation.network.attention.values())

    worker = simulation.attention["attention-0"]
    simulation.world.run(lambda: False, 1.0)
    simulation.freeze_attention(worker, 0.5)
    simulation.world.run(lambda: False, 2.0)
    assert worker.life in lives()
    simulation.freeze_attention(worker, 4.0)
    simulation.world.run(lambda: False, 6.0)
    assert worker.life not in lives()
    assert sum(life.startswith("attention-0@") for life in lives()) == 1


@pytest.mark.system
@pytest.mark.timeout(300)
def test_seeds_hold() -> None:
    """Whatever these seeds let go wrong: every request ends with its tokens or late, and nothing is left."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seeds", SEEDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
