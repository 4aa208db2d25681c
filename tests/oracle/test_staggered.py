"""Two staggered micro-batches: transformers' tokens, the same bits run after run, and whole steps or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from cluster.config import AttentionConfig, LaneConfig, TierConfig
from cluster.errors import AnabranchError, Fenced, Internal, LaneBroken, NeedFull
from cluster.policies.micro_batches import MicroBatches
from cluster.types import Epoch, WorkerId
from tests.cluster_harness import DenseCluster, Listener, Shape, counted, decoder_of, request
from tests.models import Reference, reference_tokens
from tests.oracle.test_sharding import COUNT, PROMPTS, assert_same
from workers.attention.core import AttentionCore
from workers.dense.lane_set import LaneSet
from workers.dense.members import AttentionMember
from workers.dense.sampler import Sampled
from workers.dense.sequences import LiveSequence, Placed
from workers.dense.step_layout import Chunk
from workers.dense.step_runner import StepRunner
from workers.kernels.select import select
from workers.lanes.messages import Lane, LayerMessage, PartialReply
from workers.peer import AttentionPeer, ShardPrefix

TWO: dict[str, dict[str, Any]] = {"dense": {"micro_batches": 2}}
SHAPES = {
    "1-local": Shape(attention_workers=1, overrides=TWO),
    "2-tcp": Shape(attention_workers=2, transports=("tcp",), overrides=TWO),
    "3-grpc": Shape(attention_workers=3, transports=("grpc",), overrides=TWO),
    "local arena that overflows": Shape(attention_workers=2, local_blocks=4, overrides=TWO),
    "small chunks": Shape(attention_workers=2, step_tokens=7, max_batch=7, overrides=TWO),
    "small arenas": Shape(attention_workers=2, worker_blocks=7, overrides=TWO),
}
MICRO_BATCHES = "anabranch_dense_micro_batches"
STEPS = "anabranch_dense_steps"


@pytest.fixture(scope="module")
def references(folder: Path) -> list[Reference]:
    """What transformers generates after each of the prompts."""
    return reference_tokens(folder, PROMPTS[:6], COUNT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_equal_transformers(shape: Shape, folder: Path, references: list[Reference]) -> None:
    """A batch of six gives transformers' tokens over two micro-batches. How many steps have two is a matter
    of time where arenas are small and sequences wait: as many as half of one's tokens at least.
    """
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:6])
        staggered = counted(cluster.engine, MICRO_BATCHES) - counted(cluster.engine, STEPS)
        assert staggered >= COUNT // 2
    assert_same(outputs, references)


def run_steps(folder: Path, micro_batches: Literal[1, 2], steps: int) -> list[Sampled]:
    """Four sequences by the runner alone, prompts whole, then decoding: what each step samples."""
    decoder = decoder_of(folder)
    geometry = decoder.spec.geometry("float32", 16)
    tier = TierConfig(arena=64 * geometry.block_bytes)
    with AttentionCore(AttentionConfig(), tier, geometry, WorkerId("a"), Epoch(1)) as core:
        peer, lanes = core.peer(), LaneSet(LaneConfig())
        lanes.add(peer.worker, peer.epoch, peer.open_lane())  # as a remote one: it is worth staggering
        runner = StepRunner(decoder, select("auto", "cpu"), lanes, MicroBatches(micro_batches))
        live = [
            LiveSequence.of(
                request(prompt, COUNT, logprobs=0, temperature=1.0, seed=3), Listener(), 0.0, geometry
            )
            for prompt in PROMPTS[:4]
        ]
        for one in live:
            granted = peer.reserve(one.key, one.generation, 0, one.max_length, ShardPrefix())
            one.place([Placed(granted.shard, one.generation)])
        found, starts = list[Sampled](), [0] * len(live)
        for step in range(steps):
            chunks, offset = list[Chunk](), 0
            for index, one in enumerate(live):
                count = len(one.token_ids) - starts[index]
                chunks.append(Chunk(one, starts[index], count, samples=True, offset=offset))
                starts[index], offset = len(one.token_ids), offset + count
            outcome = runner.run(step, chunks)
            assert outcome.micro_batches == micro_batches
            for chunk, sampled in outcome.sampled:
                assert isinstance(sampled, Sampled)
                chunk.sequence.append(sampled.token_id)
                found.append(sampled)
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_same_plans_give_the_same_bits(micro_batches: Literal[1, 2], folder: Path) -> None:
    """Tokens and log-probabilities of two runs over the same steps are equal to the last bit."""
    assert run_steps(folder, micro_batches, COUNT) == run_steps(folder, micro_batches, COUNT)


class FaultyLane:
    """A lane that fails once: when the reply of one micro-batch and layer is asked for."""

    def __init__(self, lane: Lane, micro_batch: int, layer: int, faults: list[AnabranchError]) -> None:
        self._lane = lane
        self._place = (micro_batch, layer)
        self._faults = faults

    def send(self, message: LayerMessage) -> None:
        """See `Lane`."""
        self._lane.send(message)

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """The reply, or the fault; nobody reads the reply then."""
        if self.is_due(step, micro_batch, layer):
            raise self._faults.pop()
        return self._lane.receive(step, micro_batch, layer, deadline_s)

    def is_due(self, step: int, micro_batch: int, layer: int) -> bool:
        """Whether this reply is the place of a fault still to come."""
        return (micro_batch, layer) == self._place and bool(self._faults) and step > 5

    def shut_down(self) -> None:
        """See `Lane`."""
        self._lane.shut_down()

    def close(self) -> None:
        """See `Lane`."""
        self._lane.close()


class LyingLane(FaultyLane):
    """A lane of which one reply has a row for several."""

    def receive(self, step: int, micro_batch: int, layer: int, deadline_s: float) -> PartialReply:
        """The reply, or its first row."""
        reply = self._lane.receive(step, micro_batch, layer, deadline_s)
        if len(reply.out) == 1 or not self.is_due(step, micro_batch, layer):
            return reply
        self._faults.pop()
        return replace(reply, out=reply.out[:1], lse=reply.lse[:1])


class FaultyCluster(DenseCluster):
    """A cluster whose first worker's lane fails once in the middle of a step."""

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        micro_batch: int,
        layer: int,
        fault: AnabranchError,
        kind: type[FaultyLane] = FaultyLane,
    ) -> None:
        self.faults = [fault]
        self._place = (micro_batch, layer)
        self._kind = kind
        super().__init__(folder, shape)

    def connect(self, member: AttentionMember) -> AttentionPeer:
        """The peer, its lanes faulty where it is the first worker's."""
        peer = super().connect(member)
        if member.worker != "attention-0":
            return peer
        open_lane = peer.open_lane
        peer.open_lane = lambda: self._kind(open_lane(), *self._place, self.faults)  # type: ignore[method-assign]
        return peer


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "fault", [LaneBroken("cut"), NeedFull("another base"), Fenced("gone", shards="")], ids=lambda f: f.reason
)
def test_a_fault_in_one_micro_batch_repeats_the_whole_step(
    micro_batch: int, layer: int, fault: AnabranchError, folder: Path, references: list[Reference]
) -> None:
    """While the other micro-batch is under way, its replies unread: the step counts for nothing, is repeated,
    and no token of either micro-batch is wrong, missing or doubled.
    """
    # What was lost with a lane is freed by its lease: wait for that, not for long.
    overrides = {**TWO, "attention": {"lease_ms": 1000}}
    shape = Shape(attention_workers=2, overrides=overrides)
    _assert_survived(FaultyCluster(folder, shape, micro_batch, layer, fault), references)


def _assert_survived(cluster: FaultyCluster, references: list[Reference]) -> None:
    """A step was aborted, and every output is the reference's; nothing is held afterwards."""
    with cluster:
        outputs = cluster.generate(request(prompt, COUNT) for prompt in PROMPTS[:6])
        assert cluster.faults == []
        assert counted(cluster.engine, "anabranch_dense_steps_aborted") >= 1
        cluster.wait_all_free()
    assert_same(outputs, references)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reply_of_too_few_rows_is_not_spread_over_all(
    workers: int, folder: Path, references: list[Reference]
) -> None:
    """A worker that answers one row for many, in a frame that checks, costs its lane, and neither a token nor
    the engine.
    """
    shape = Shape(attention_workers=workers, overrides={**TWO, "attention": {"lease_ms": 1000}})
    _assert_survived(FaultyCluster(folder, shape, 0, 1, Internal("lies"), LyingLane), references)
