"""The directory's copy: how much of it is written at a time, who waits for that, and what is noticed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent import futures

from anabranch.v1 import control_pb2
from cluster.clock import Clock, ManualClock
from cluster.policies.directory import HeldBlock, Life
from cluster.registry.embedded import EmbeddedRegistry
from cluster.registry.interface import ControllerRecord
from cluster.types import Epoch, WorkerId
from controller.directory_copy import DirectoryCopy
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable, Terms
from tests.registry_controller import chain

WRITER = Epoch(1)
HOLDER = Life(WorkerId("attention-0"), Epoch(10))
WAIT_S = 20.0


class Registry(EmbeddedRegistry):
    """One that takes some time for each call that writes blocks, or does not return from it for a while."""

    def __init__(self, clock: ManualClock, call_s: float = 0.0) -> None:
        super().__init__(3600.0, 100_000, clock)
        self._manual, self._call_s = clock, call_s
        self.is_called, self.may_return = threading.Event(), threading.Event()
        self.may_return.set()
        self.claim(ControllerRecord(WRITER, "127.0.0.1:8600", "", b""), take_over=True)

    def publish_blocks(self, writer: Epoch, blocks: Sequence[HeldBlock], *, starts_over: bool = False) -> int:
        """See `Registry`."""
        self.is_called.set()
        assert self.may_return.wait(WAIT_S)
        self._manual.advance(self._call_s)
        return super().publish_blocks(writer, blocks, starts_over=starts_over)

    def kept(self) -> list[HeldBlock]:
        """All blocks, in order."""
        return sorted(block for part in self.read_blocks() for block in part)


def keeper(clock: Clock) -> DirectoryKeeper:
    """A directory that nobody reported to."""
    return DirectoryKeeper(MembershipTable(Terms("digest", 500, 2500), clock))


def tell(directory: DirectoryKeeper, number: int, published: Sequence[HeldBlock]) -> bool:
    """A report of the one worker there is; its first one starts over."""
    blocks = [
        control_pb2.SealedBlock(hash=block.identity, prefix_blocks=block.prefix_blocks) for block in published
    ]
    pool = control_pb2.PoolReport(number=number, starts_over=number == 1, published=blocks)
    return directory.take(
        control_pb2.HeartbeatRequest(worker_id=HOLDER.worker, epoch=HOLDER.epoch, pool=pool)
    )


def test_a_slow_registry_gets_little_at_a_time() -> None:
    """A round ends when its time is over, whatever is left; the next ones go on, the earliest first."""
    clock = ManualClock()
    registry, directory, blocks = Registry(clock, call_s=0.03), keeper(clock), chain(4000, HOLDER)
    copy = DirectoryCopy(directory, round_s=0.1, clock=clock)
    assert tell(directory, 1, blocks)
    written = []
    while registry.kept() != blocks:
        began_s = clock()
        copy.write(registry, WRITER, is_refresh=False)
        assert clock() - began_s <= 0.1 + 0.03
        written.append(len(registry.kept()))
        assert registry.kept() == blocks[: written[-1]]
    assert len(written) > 2


def test_reports_and_questions_do_not_wait_for_the_registry() -> None:
    """While a call to the registry does not return, reports are taken and prefixes found."""
    clock = ManualClock()
    registry, directory, blocks = Registry(clock), keeper(clock), chain(3, HOLDER)
    copy = DirectoryCopy(directory, round_s=0.1, clock=clock)
    registry.may_return.clear()
    with futures.ThreadPoolExecutor(1) as pool:
        try:
            round_ = pool.submit(copy.write, registry, WRITER, is_refresh=False)
            assert registry.is_called.wait(WAIT_S)
            assert tell(directory, 1, blocks)
            asked = control_pb2.FindPrefixRequest(block_hashes=[blocks[0].identity])
            assert list(directory.find(asked)) == []  # membership knows nobody: the question was answered
            assert not round_.done()
        finally:
            registry.may_return.set()
        round_.result(WAIT_S)
    assert registry.kept() == blocks


def test_what_is_missing_is_noticed_at_the_next_refresh() -> None:
    """Blocks that somebody took away, or that changed while nothing was noted, are written again."""
    clock = ManualClock()
    registry, directory, blocks = Registry(clock), keeper(clock), chain(1200, HOLDER)
    copy = DirectoryCopy(directory, round_s=0.1, clock=clock)
    assert tell(directory, 1, blocks[:-1])
    copy.write(registry, WRITER, is_refresh=True)
    registry.publish_blocks(WRITER, [blocks[5]._replace(holders=())])
    copy.write(registry, WRITER, is_refresh=False)
    assert len(registry.kept()) == len(blocks) - 2
    for _ in range(2):
        copy.write(registry, WRITER, is_refresh=True)
    assert registry.kept() == blocks[:-1]
    copy.lose_track()
    assert tell(directory, 2, blocks[-1:])
    copy.write(registry, WRITER, is_refresh=False)
    assert registry.kept() == blocks
