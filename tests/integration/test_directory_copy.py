"""The directory's copy in a real Redis: what follows it, who begins with it, and a Redis without room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as joined

import pytest

from cluster.blocks import BlockHash
from cluster.clock import ManualClock
from cluster.config import TlsConfig
from cluster.policies.directory import HeldBlock, Life, Run
from cluster.registry.interface import Registry
from cluster.types import Epoch, WorkerId
from tests.controlled import await_
from tests.redis_server import BINARY, MISSING, LocalRedis
from tests.registry_controller import Controller, chain, noted_events
from workers.dense.finder import CopyFinder, PrefixFinder

pytestmark = [pytest.mark.redis, pytest.mark.skipif(BINARY is None, reason=MISSING)]

A, B = Life(WorkerId("attention-0"), Epoch(10)), Life(WorkerId("attention-1"), Epoch(11))
LONG = 2000
"""Blocks for which one call is not enough."""


@pytest.fixture
def first(server: LocalRedis, controllers: list[Controller]) -> Controller:
    """A controller with two members that hold nothing yet."""
    controllers.append(Controller(server, 1))
    controllers[0].begin()
    for life in (A, B):
        controllers[0].register(*life)
        assert controllers[0].report(*life, starts_over=True)
    controllers[0].writer.write()
    return controllers[0]


def _successor(server: LocalRedis, controllers: list[Controller], inherits: bool = True) -> Controller:
    controllers.append(Controller(server, 2, inherits=inherits))
    controllers[-1].begin()
    return controllers[-1]


def _kept(registry: Registry) -> list[HeldBlock]:
    return sorted(joined.from_iterable(registry.read_blocks()))


def _identities(blocks: Sequence[HeldBlock]) -> list[BlockHash]:
    return [block.identity for block in blocks]


def test_the_copy_follows_the_directory(first: Controller) -> None:
    """What is published, withdrawn and lost with its worker is written in the next round, and counted."""
    blocks = chain(LONG, A)
    first.report(*A, published=blocks)
    first.report(*B, published=blocks[:1])
    first.writer.write()
    assert _kept(first.registry) == [blocks[0]._replace(holders=(A, B)), *blocks[1:]]
    assert first.writer.metrics.get_sample_value("anabranch_registry_blocks") == LONG
    first.report(*A, withdrawn=blocks[2:])
    first.writer.write()
    assert _kept(first.registry) == [blocks[0]._replace(holders=(A, B)), blocks[1]]
    first.table.remove(A.worker)
    first.directory.sweep()
    first.writer.write()
    assert _kept(first.registry) == [blocks[0]._replace(holders=(B,))]


def test_a_successor_answers_before_it_was_told(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """It names at once what living members held; what a member reports to it replaces that, and the copy
    follows. A report that tells only changes is not taken.
    """
    blocks = chain(LONG, A)
    first.report(*A, published=blocks)
    first.report(*B, published=blocks[:2])
    first.writer.write()
    second = _successor(server, controllers)
    assert second.found(blocks) == [{A, B}] * 2 + [{A}] * (LONG - 2)
    assert _kept(second.registry) == _kept(first.registry)
    for life in (A, B):
        second.register(*life)
        assert not second.report(*life)
    assert second.report(*A, published=blocks[:1], starts_over=True)
    assert second.found(blocks) == [{A, B}, {B}]
    second.writer.write()
    assert [set(block.holders) for block in _kept(second.registry)] == [{A, B}, {B}]


def test_what_a_dead_member_held_is_not_restored(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """Blocks of a life that membership no longer knows are neither named nor kept."""
    blocks = chain(4, A)
    first.report(*A, published=blocks)
    first.report(*B, published=blocks[:2])
    first.writer.write()
    first.registry.publish(Epoch(1), 99, (), [A])
    second = _successor(server, controllers)
    assert second.found(blocks) == [{B}, {B}]
    assert _kept(second.registry) == [block._replace(holders=(B,)) for block in blocks[:2]]


def test_a_successor_that_inherits_nothing_empties_the_copy(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """Where all processes ended with the controller."""
    first.report(*A, published=chain(4, A))
    first.writer.write()
    second = _successor(server, controllers, inherits=False)
    assert second.found(chain(4)) == []
    assert _kept(second.registry) == []


def test_a_registry_that_comes_back_empty_gets_everything(server: LocalRedis, first: Controller) -> None:
    """After its absence, in which blocks came and went, and after somebody emptied it unseen."""
    blocks = chain(LONG, A)
    first.report(*A, published=blocks[:-1])
    first.writer.write()
    server.kill()
    first.writer.write()
    first.report(*A, published=blocks[-1:], withdrawn=blocks[:1])
    server.start()
    first.writer.write()
    assert _kept(first.registry) == blocks[1:]
    with server.client() as client:
        client.flushall()
    first.clock.advance(10.0)
    for _ in range(2):
        first.writer.write()
    assert _kept(first.registry) == blocks[1:]
    assert {record.worker for record in first.registry.read().members} == {A.worker, B.worker}


def test_a_registry_without_room_keeps_who_lives(server: LocalRedis, first: Controller) -> None:
    """Out of memory because of blocks: they make room, so that members are written; that is logged once.
    After a rest they are written again, and a later refusal is logged again.
    """
    blocks = chain(20_000, A)
    with server.client() as client, noted_events("anabranch.registry") as events:
        for times in (1, 2):
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 400_000)
            first.report(*A, published=blocks)
            for _ in range(2):
                first.writer.write()
                first.clock.advance(301.0)
            first.writer.write()
            assert events.count("directory_not_copied") == times
            assert _kept(first.registry) == []
            first.register("dense-0", times)
            _await_written(first, Epoch(times))
            client.config_set("maxmemory", "0")
            first.clock.advance(301.0)
            first.writer.write()
            assert _kept(first.registry) == blocks
            first.report(*A, withdrawn=blocks)
            first.writer.write()
    assert events.count("registry_state") <= 2


def test_blocks_make_room_for_a_member(server: LocalRedis, first: Controller) -> None:
    """A Redis that became full while nothing of the directory changed: the copy goes, the member comes."""
    first.report(*A, published=chain(20_000, A))
    first.writer.write()
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 400_000)
        first.register("dense-0", 77)
        _await_written(first, Epoch(77))
    assert _kept(first.registry) == []


def _await_written(controller: Controller, epoch: Epoch) -> None:
    """Memory that was given up comes back a moment later."""

    def is_written() -> bool:
        controller.writer.write()
        return epoch in {record.epoch for record in controller.registry.read().members}

    await_(is_written)


def test_a_long_copy_is_read_in_several_rounds(
    server: LocalRedis, first: Controller, controllers: list[Controller]
) -> None:
    """A round that has taken its time goes on in the next one; nothing is written before all was read."""
    blocks = chain(LONG, A)
    first.report(*A, published=blocks)
    first.writer.write()

    class TickingClock(ManualClock):
        def __call__(self) -> float:
            self.now_s += 0.11
            return self.now_s

    second = Controller(server, 2, clock=TickingClock())
    controllers.append(second)
    second.begin()
    found = [len(second.found(blocks))]
    while found[-1] < LONG and len(found) < 20:
        second.writer.write()
        found.append(len(second.found(blocks)))
        assert _kept(second.registry) == blocks
    assert len(found) > 3
    assert found[-1] == LONG


def test_a_dense_worker_asks_the_copy_while_the_controller_is_away(
    server: LocalRedis, first: Controller
) -> None:
    """Whether the call fails or the controller is left alone; a registry that does not answer either finds
    nothing, is left alone for a second, and is asked again.
    """
    blocks = chain(3, A)
    first.report(*A, published=blocks)
    first.writer.write()
    clock = ManualClock()
    copy = CopyFinder(server.config(), clock)
    finder = PrefixFinder("127.0.0.1:9", TlsConfig(), clock, otherwise=copy.find)
    for _ in range(2):
        assert finder.find(_identities(blocks), 0) == (Run(3, (A,)),)
        assert finder.is_paused
    assert finder.find(_identities(blocks[1:]), 1) == (Run(2, (A,)),)
    assert finder.find(_identities(blocks), 1) == ()
    with noted_events("anabranch.dense.finder") as events:
        server.kill()
        assert [finder.find(_identities(blocks), 0) for _ in range(2)] == [(), ()]
        server.start()
        assert finder.find(_identities(blocks), 0) == ()
        first.clock.advance(10.0)
        first.writer.write()
        first.writer.write()
        clock.advance(1.01)
        assert finder.find(_identities(blocks), 0) == (Run(3, (A,)),)
    assert events.count("directory_copy_away") == 1
    finder.close()
    copy.close()
