"""A real attention worker on loopback, and a dense side that speaks to it message by message.

Knows nothing of pytest. The geometry is tiny; keys, values and queries are drawn from a seed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster import rpc
from cluster.config import Config
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardId, WorkerId
from workers.attention.worker import AttentionWorker
from workers.lanes.dial import Caller, dial
from workers.lanes.framed import FramedLane
from workers.lanes.messages import Lane, LayerMessage, PartialReply, PlanRow
from workers.lanes.plans import PlanEncoder

GEOMETRY = KvGeometry(
    layers=3, query_heads=4, kv_heads=2, head_size=16, dtype="float32", block_tokens=4, digest="tiny"
)
WORKER = WorkerId("attention-0")
EPOCH = Epoch(0xA77E)
BLOCKS = 32
DEADLINE_S = 10.0


def config(**attention: object) -> Config:
    """A cluster whose attention workers hold `BLOCKS` blocks and serve all transports."""
    arena = BLOCKS * GEOMETRY.block_bytes
    return Config.model_validate(
        {
            "attention": {"arena": arena, "block_tokens": GEOMETRY.block_tokens, **attention},
            "lanes": {"transports": ["local", "tcp", "grpc"]},
            "dense": {"step_tokens": 64},
        }
    )


@contextlib.contextmanager
def serving(settings: Config | None = None) -> Iterator[AttentionWorker]:
    """A started worker; afterwards its account must still add up."""
    worker = AttentionWorker(settings or config(), WORKER, EPOCH)
    try:
        worker.start(GEOMETRY)
        yield worker
        worker.core.store.audit()
    finally:
        worker.stop()


class DenseHost:
    """Where a dense worker would run: a gRPC channel to one attention worker, and the lanes it opened."""

    def __init__(self, worker: AttentionWorker) -> None:
        self.worker = worker
        self.address = f"127.0.0.1:{worker.port}"
        self.channel = rpc.channel(self.address, config().security.tls)
        self._lanes: list[Lane] = []

    def open_lane(self, *transports: str) -> FramedLane:
        """A lane over the first of `transports` that works; a unix socket if none is named."""
        lane = dial(self.channel, self.address, EPOCH, caller(*transports))
        self._lanes.append(lane)
        return lane

    def close(self) -> None:
        """Close lanes and channel. Idempotent."""
        for lane in self._lanes:
            lane.close()
        self.channel.close()


def host_of(worker: AttentionWorker) -> contextlib.closing[DenseHost]:
    """A host for `with`, closed at its end."""
    return contextlib.closing(DenseHost(worker))


def caller(*transports: str, geometry: KvGeometry = GEOMETRY) -> Caller:
    """A dense worker that offers `transports`."""
    return Caller(WorkerId("dense-0"), Epoch(1), geometry, transports or ("local",), rows_most=64 * 64)


@dataclass
class SmallSequence:
    """A sequence with all its keys and values, of which an attention worker holds a shard."""

    seed: int
    length: int = 40
    generation: Generation = field(default=Generation(1))
    name: str = ""
    """Of the request, where two of the same contents are meant; default: by its seed."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (GEOMETRY.layers, self.length, GEOMETRY.kv_heads, GEOMETRY.head_size)
        self.key = SequenceKey(self.name or f"request-{self.seed}")
        self.keys = torch.randn(shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        self.queries = torch.randn(
            (GEOMETRY.layers, self.length, GEOMETRY.query_heads, GEOMETRY.head_size), generator=generator
        )
        self.token_ids = tuple(torch.randint(0, 1000, (self.length,), generator=generator).tolist())

    def under(self, generation: int) -> SmallSequence:
        """The same sequence in another life."""
        return SmallSequence(self.seed, self.length, Generation(generation))

    def row(
        self,
        shard: ShardId,
        start: int,
        count: int,
        visible: tuple[int, int] | None = None,
        *,
        tail: bool = True,
    ) -> PlanRow:
        """A chunk; visible is all before it unless given."""
        first, end = (0, start) if visible is None else visible
        ids = self.token_ids[start : start + count] if tail else ()
        return PlanRow(shard, self.generation, start, count, first, end, ids)

    def expected(self, row: PlanRow, layer: int) -> tuple[Tensor, Tensor]:
        """out [count, query_heads, head_size] and lse [count, query_heads] over what the row names; of no
        rows where it sees nothing.
        """
        seen = slice(row.visible_first, row.visible_end)
        group = GEOMETRY.query_heads // GEOMETRY.kv_heads
        key = self.keys[layer, seen].double().repeat_interleave(group, 1)
        value = self.values[layer, seen].double().repeat_interleave(group, 1)
        query = self.queries[layer, _asking(row)].double()
        scores = torch.einsum("rhd,shd->rhs", query, key) * GEOMETRY.head_size**-0.5
        out = torch.einsum("rhs,shd->rhd", scores.softmax(-1), value)
        return out.float(), scores.logsumexp(-1).float()


class DenseSide:
    """Sends whole steps over a lane as a dense worker would, and keeps the plan's history."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.encoder = PlanEncoder()
        self.step_number = 0

    def step(
        self,
        parts: Sequence[tuple[SmallSequence, PlanRow]],
        micro_batch: int = 0,
        layers: Sequence[int] | None = None,
    ) -> list[PartialReply]:
        """Run a step; the replies of its layers, copied. `layers` sends only some messages of it."""
        self.step_number += 1
        replies: list[PartialReply] = []
        for layer in range(GEOMETRY.layers + 1) if layers is None else layers:
            self.lane.send(self.message(parts, layer, micro_batch))
            if layer < GEOMETRY.layers:
                replies.append(self.receive(layer, micro_batch))
        return replies

    def receive(self, layer: int, micro_batch: int = 0) -> PartialReply:
        """The present step's reply of a layer, copied out of the lane's buffer."""
        deadline_s = time.monotonic() + DEADLINE_S
        reply = self.lane.receive(self.step_number, micro_batch, layer, deadline_s)
        return PartialReply(
            reply.step, reply.micro_batch, layer, reply.out.clone(), reply.lse.clone(), reply.compute_seconds
        )

    def message(
        self, parts: Sequence[tuple[SmallSequence, PlanRow]], layer: int, micro_batch: int = 0
    ) -> LayerMessage:
        """The message of one layer of the present step."""
        plan = query = key = value = None
        if layer == 0:
            plan = self.encoder.encode(self.step_number, micro_batch, [row for _, row in parts])
        if layer < GEOMETRY.layers:
            query = torch.cat([sequence.queries[layer, _asking(row)] for sequence, row in parts])
        tails = [(sequence, row) for sequence, row in parts if row.token_ids]
        if layer > 0 and tails:
            key = torch.cat([sequence.keys[layer - 1, _positions(row)] for sequence, row in tails])
            value = torch.cat([sequence.values[layer - 1, _positions(row)] for sequence, row in tails])
        return LayerMessage(
            self.step_number, micro_batch, layer, int(DEADLINE_S * 1000), plan, query, key, value
        )


def _positions(row: PlanRow) -> slice:
    return slice(row.start, row.start + row.count)


def _asking(row: PlanRow) -> slice:
    return _positions(row) if row.sees else slice(0, 0)


def assert_attended(replies: Sequence[PartialReply], parts: Sequence[tuple[SmallSequence, PlanRow]]) -> None:
    """Every layer's reply is the attention its rows asked for, and nothing else."""
    assert [reply.layer for reply in replies] == list(range(GEOMETRY.layers))
    for reply in replies:
        expected = [sequence.expected(row, reply.layer) for sequence, row in parts]
        out, lse = torch.cat([out for out, _ in expected]), torch.cat([lse for _, lse in expected])
        torch.testing.assert_close(reply.out, out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reply.lse, lse, atol=1e-5, rtol=1e-5)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait until a condition comes true, looking often; fails after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        pause.wait(0.005)


def query_message(
    step: int = 1, rows: int = 1, micro_batch: int = 0, deadline_ms: int = 10_000
) -> LayerMessage:
    """A query without a plan, for handlers that need none."""
    query = torch.ones(rows, GEOMETRY.query_heads, GEOMETRY.head_size)
    return LayerMessage(step, micro_batch, 0, deadline_ms, query=query)
