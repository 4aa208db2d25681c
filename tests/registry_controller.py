"""A controller's tables and its copy in a real Redis; rounds are made by hand, on a clock of its own."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anabranch.v1 import control_pb2, inference_pb2, types_pb2
from cluster.blocks import BlockHash
from cluster.clock import ManualClock
from cluster.policies.directory import HeldBlock, Life
from cluster.registry.interface import Registry
from cluster.registry.opening import open_registry
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable, Terms
from controller.registry_writer import RegistryWriter
from tests.redis_server import LocalRedis

EXPIRY_S = 2.5
HEARTBEAT_S = 0.5
DIGEST = "digest-of-the-file"


def chain(count: int, *holders: Life, seed: int = 0) -> list[HeldBlock]:
    """The blocks of one prefix, as these lives hold them."""
    return [
        HeldBlock(BlockHash((seed << 32 | number).to_bytes(32, "big")), number + 1, holders)
        for number in range(count)
    ]


@contextmanager
def noted_events(name: str) -> Iterator[list[str]]:
    """What a logger says meanwhile."""
    events: list[str] = []

    class Probe(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            events.append(record.getMessage())

    handler = Probe()
    log = logging.getLogger(name)
    log.addHandler(handler)
    log.setLevel("INFO")
    try:
        yield events
    finally:
        log.removeHandler(handler)


class Controller:
    """A table, its writer, and short ways to speak to them; rounds are made by hand."""

    def __init__(
        self,
        server: LocalRedis,
        epoch: int,
        digest: str = DIGEST,
        inherits: bool = True,
        clock: ManualClock | None = None,
    ) -> None:
        self.clock = clock or ManualClock()
        terms = Terms(digest, int(HEARTBEAT_S * 1000), int(EXPIRY_S * 1000))
        self.table = MembershipTable(terms, self.clock)
        self.registry: Registry = open_registry(server.config(deadline_ms=200))
        self.welcome = control_pb2.RegisterResponse(
            responder=types_pb2.Responder(worker_id="controller-0", epoch=epoch)
        )
        self.times_taken = 0
        self.numbers: Counter[Life] = Counter()
        self.directory = DirectoryKeeper(self.table)
        self.writer = RegistryWriter(
            self.registry,
            self.table,
            self.directory,
            inherits=inherits,
            on_taken=self._note_taken,
            clock=self.clock,
        )

    def begin(self) -> None:
        """Learn who lived, and take over the writing."""
        self.writer.inherit()
        self.writer.claim(self.welcome, "127.0.0.1:8600", self.table.terms.config_digest)

    def register(self, worker_id: str, epoch: int) -> None:
        """A dense worker joins."""
        member = inference_pb2.Member(
            worker_id=worker_id, role=inference_pb2.ROLE_DENSE, epoch=epoch, address="127.0.0.1:1"
        )
        self.table.register(
            control_pb2.RegisterRequest(
                member=member,
                wire_version=WIRE_VERSION,
                layout_version=LAYOUT_VERSION,
                config_digest=self.table.terms.config_digest,
            )
        )

    def beat(self, worker_id: str, epoch: int, **fields: Any) -> None:
        """A sign of life."""
        self.table.heartbeat(control_pb2.HeartbeatRequest(worker_id=worker_id, epoch=epoch, **fields))

    def report(
        self,
        worker_id: str,
        epoch: int,
        published: Iterable[HeldBlock] = (),
        withdrawn: Iterable[HeldBlock] = (),
        starts_over: bool = False,
    ) -> bool:
        """A worker's next report of its blocks; whether it was taken."""
        life = Life(WorkerId(worker_id), Epoch(epoch))
        self.numbers[life] += 1
        pool = control_pb2.PoolReport(
            number=self.numbers[life],
            starts_over=starts_over,
            published=[
                control_pb2.SealedBlock(hash=block.identity, prefix_blocks=block.prefix_blocks)
                for block in published
            ],
            withdrawn=[block.identity for block in withdrawn],
        )
        return self.directory.take(control_pb2.HeartbeatRequest(worker_id=worker_id, epoch=epoch, pool=pool))

    def found(self, blocks: Sequence[HeldBlock]) -> list[set[tuple[str, int]]]:
        """Whom `FindPrefix` names for these blocks, one after the other."""
        asked = control_pb2.FindPrefixRequest(block_hashes=[block.identity for block in blocks])
        return [
            {(holder.worker_id, holder.epoch) for holder in run.holders}
            for run in self.directory.find(asked)
            for _ in range(run.blocks)
        ]

    def pass_time(self, seconds: float) -> list[str]:
        """Sweep at every heartbeat, as the controller does; returns who fell silent."""
        silent: list[str] = []
        for _ in range(int(seconds / HEARTBEAT_S)):
            self.clock.advance(HEARTBEAT_S)
            silent += [each.worker_id for each in self.table.sweep(frozen=self.writer.is_away)]
        return silent

    def _note_taken(self) -> None:
        self.times_taken += 1

    @property
    def lives(self) -> dict[str, int]:
        """Who lives, as the table says."""
        return {member.worker_id: member.epoch for member in self.table.membership().members}

    @property
    def up(self) -> float | None:
        """The metric."""
        return self.writer.metrics.get_sample_value("anabranch_registry_up")
