"""A small cluster in this process: a tiny model, attention workers on loopback, a dense engine over them.

Knows nothing of pytest. Everything is real but the processes: servers on free ports, sockets, threads.

    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        (output,) = cluster.generate([request(prompt)])
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch

from cluster.config import Config, TierConfig, TlsConfig
from cluster.config_values import Serves
from cluster.errors import AnabranchError
from cluster.policies.prefixes import Find
from cluster.sampling import SamplingParameters
from cluster.types import Epoch, KvGeometry, SequenceKey, ShardRef, WorkerId, draw_epoch
from tests.models import Reference
from workers.attention.core import AttentionCore
from workers.attention.worker import AttentionWorker
from workers.dense.deltas import Delta, FinishReason, Handoff, Timings
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.remote_peer import RemotePeer
from workers.dense.sequences import Submission
from workers.kernels.select import select
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller
from workers.lanes.framed import FramedLane
from workers.lanes.messages import Lane
from workers.peer import AttentionPeer

WAIT_S = 30.0
"""Longest any wait of a test takes before it fails."""

torch.set_num_threads(1)

_request_numbers = itertools.count()


@functools.cache
def decoder_of(folder: Path) -> Decoder:
    """The folder's model in float32, loaded once."""
    return Decoder.from_folder(folder)


@dataclass(frozen=True)
class Shape:
    """What a cluster consists of. local_blocks: blocks of an arena in the dense worker itself."""

    attention_workers: int = 0
    local_blocks: int = 0
    worker_blocks: int = 256
    block_tokens: int = 16
    shard_tokens: int = 32
    step_tokens: int = 64
    max_batch: int = 16
    transports: tuple[str, ...] = ("local",)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """More of the configuration, by section."""

    def config(self, geometry_of: Callable[[int], KvGeometry]) -> Config:
        """The cluster's configuration."""
        block_bytes = geometry_of(self.block_tokens).block_bytes
        sections: dict[str, dict[str, Any]] = {
            "dense": {
                "step_tokens": self.step_tokens,
                "max_batch": min(self.max_batch, self.step_tokens),
                "local_arena": self.local_blocks * block_bytes,
                "reserve_ahead_tokens": 8,
            },
            "attention": {
                "replicas": self.attention_workers,
                "arena": self.worker_blocks * block_bytes,
                "block_tokens": self.block_tokens,
            },
            "placement": {"shard_tokens": self.shard_tokens},
            "lanes": {"transports": self.transports},
        }
        for section, keys in self.overrides.items():
            sections.setdefault(section, {}).update(keys)
        return Config.model_validate(sections)


@dataclass
class Output:
    """What became of one sequence so far."""

    token_ids: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    maps: list[tuple[ShardRef, ...]] = field(default_factory=list)
    finish: FinishReason | None = None
    matched_token_id: int | None = None
    failure: AnabranchError | None = None
    timings: Timings | None = None
    handoff: Handoff | None = None
    cached_tokens: int = 0

    @property
    def is_over(self) -> bool:
        """Whether its last delta came."""
        return self.handoff is not None or self.finish is not None or self.failure is not None


class Listener:
    """A gateway's place: collects deltas, checks that indices come once, in order; acknowledges ends."""

    def __init__(self) -> None:
        self.acknowledges = True
        self._changed = threading.Condition()
        self._engines: dict[tuple[SequenceKey, int], Engine] = {}
        self._outputs: dict[tuple[SequenceKey, int], Output] = {}
        self.problems: list[str] = []

    def expect(self, submission: Submission, engine: Engine) -> None:
        """A submission is under way: its output goes on after the tokens it carries."""
        with self._changed:
            self._outputs[submission.key, submission.generation] = Output(list(submission.output))
            self._engines[submission.key, submission.generation] = engine

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """See `Subscriber`."""
        with self._changed:
            for delta in deltas:
                self._take(self._outputs[delta.key, delta.generation], delta)
                if delta.finish is not None and self.acknowledges:
                    engine = self._engines[delta.key, delta.generation]
                    engine.acknowledge(delta.key, delta.generation, WAIT_S)
            self._changed.notify_all()

    def output(self, submission: Submission) -> Output:
        """What came so far."""
        with self._changed:
            return self._outputs[submission.key, submission.generation]

    def wait(self, submission: Submission, until: Callable[[Output], bool] | None = None) -> Output:
        """Until a condition holds, or the output is over. Raises AssertionError after `WAIT_S`."""
        output = self.output(submission)
        with self._changed:
            done = self._changed.wait_for(
                lambda: output.is_over or (until is not None and until(output)), WAIT_S
            )
            assert done, f"{submission.key} stands at {len(output.token_ids)} tokens after {WAIT_S} s"
            assert self.problems == []
            return output

    def _take(self, output: Output, delta: Delta) -> None:
        if output.is_over:
            self.problems.append(f"{delta.key}: a delta after the end")
        if delta.first_index != len(output.token_ids):
            self.problems.append(
                f"{delta.key}: index {delta.first_index} after {len(output.token_ids)} tokens"
            )
        output.token_ids += [sampled.token_id for sampled in delta.tokens]
        output.gaps += [sampled.gap for sampled in delta.tokens]
        output.logprobs += [sampled.logprob for sampled in delta.tokens]
        if delta.shard_map is not None:
            output.maps.append(delta.shard_map)
        output.finish, output.failure = delta.finish, delta.failure
        output.matched_token_id, output.handoff = delta.matched_token_id, delta.handoff
        output.timings, output.cached_tokens = delta.timings, delta.cached_tokens


def request(
    prompt: Sequence[int],
    max_tokens: int = 16,
    *,
    key: SequenceKey | None = None,
    generation: int = 1,
    output: Sequence[int] = (),
    shard_map: tuple[ShardRef, ...] | None = None,
    deadline_s: float = 60.0,
    priority: int = 0,
    **sampling: Any,
) -> Submission:
    """A submission; greedy and past end tokens unless `sampling` says otherwise."""
    options = {"temperature": 0.0, "ignore_eos": True, "seed": 0, **sampling}
    parameters = SamplingParameters(max_tokens=max_tokens, **options)
    return Submission(
        key or SequenceKey(f"request-{next(_request_numbers)}"),
        generation,
        tuple(prompt),
        tuple(output),
        parameters,
        parameters.seed or 0,
        max_tokens,
        priority,
        monotonic() + deadline_s,
        "tenant",
        shard_map,
    )


class _RecordingPeer(RemotePeer):
    """A peer whose lanes a test can look at, and break."""

    def __init__(
        self, member: AttentionMember, caller: Caller, tls: TlsConfig, lanes: list[FramedLane]
    ) -> None:
        super().__init__(member, caller, tls)
        self._lanes = lanes

    def open_lane(self) -> Lane:
        lane = super().open_lane()
        assert isinstance(lane, FramedLane)
        self._lanes.append(lane)
        return lane


class DenseCluster:
    """Attention workers, a dense engine and one listener; starts on `with`, audits at the end."""

    def __init__(self, folder: Path, shape: Shape, find: Find | None = None) -> None:
        """`find`: see `Engine`."""
        self.find = find
        self.decoder = decoder_of(folder)
        self.config = shape.config(lambda block_tokens: self.decoder.spec.geometry("float32", block_tokens))
        self.geometry = self.decoder.spec.geometry("float32", shape.block_tokens)
        self.listener = Listener()
        self.workers: dict[WorkerId, AttentionWorker] = {}
        self.epochs: dict[WorkerId, Epoch] = {}
        self.lanes: list[FramedLane] = []
        self.local: AttentionCore | None = None
        if shape.local_blocks:
            worker = WorkerId("dense-0-local")
            tier = TierConfig(arena=self.config.dense.local_arena)
            self.local = AttentionCore(
                self.config.attention,
                tier,
                self.geometry,
                worker,
                draw_epoch(),
                emulation=self.config.emulation,
            )
        for index in range(shape.attention_workers):
            self.start_worker(WorkerId(f"attention-{index}"))
        self.engine = self.new_engine()

    def new_engine(self, serves: Serves = "both") -> Engine:
        """Another dense worker over the same attention workers; `attach` starts it."""
        return Engine(
            self.config, self.decoder, select("auto", "cpu"), self.connect, serves=serves, find=self.find
        )

    def attach(self, engine: Engine) -> None:
        """Start an engine and wait until it has a lane to every worker."""
        engine.start()
        self.tell(engine)
        members = self.members()
        wait_until(lambda: all(engine.leads_to(member.worker, member.epoch) for member in members))

    def __enter__(self) -> DenseCluster:
        self.attach(self.engine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.engine.stop()
            if kind is None:
                assert not self.engine.failed.done()
                assert self.listener.problems == []
                self.audit()
        finally:
            with ThreadPoolExecutor() as executor:
                list(executor.map(AttentionWorker.stop, self.workers.values()))
            if self.local is not None:
                self.local.close()

    def start_worker(self, worker: WorkerId) -> None:
        """Start an attention worker, or a new life of one."""
        self.epochs[worker] = draw_epoch()
        self.workers[worker] = AttentionWorker(self.config, worker, self.epochs[worker])
        self.workers[worker].start(self.geometry)

    def kill_worker(self, worker: WorkerId) -> None:
        """End an attention worker as a crash would: its connections break, its blocks are gone."""
        self.workers.pop(worker).stop()

    def members(self) -> list[AttentionMember]:
        """What membership would say."""
        found = [
            AttentionMember(
                worker,
                self.epochs[worker],
                f"127.0.0.1:{server.port}",
                server.core.arena.blocks,
                server.core.store.audit().available,
            )
            for worker, server in self.workers.items()
        ]
        if self.local is not None:
            store, blocks = self.local.store, self.local.arena.blocks
            free = store.audit().available
            found.append(AttentionMember(store.worker, store.epoch, "", blocks, free, is_local=True))
        return found

    def tell(self, *engines: Engine) -> None:
        """Tell engines (or the first one) the present membership."""
        for engine in engines or (self.engine,):
            engine.pool.update(self.members())

    def connect(self, member: AttentionMember) -> AttentionPeer:
        """The peer of a member; see `Connect`."""
        if member.is_local:
            assert self.local is not None
            return self.local.peer()
        caller = Caller(
            WorkerId("dense-0"),
            Epoch(1),
            self.geometry,
            self.config.lanes.transports,
            rows_most(self.config, self.geometry),
        )
        return _RecordingPeer(member, caller, self.config.security.tls, self.lanes)

    def submit(self, submission: Submission, engine: Engine | None = None) -> Submission:
        """Hand a submission to the engine (or another one)."""
        engine = engine or self.engine
        self.listener.expect(submission, engine)
        engine.submit(submission, self.listener, WAIT_S)
        return submission

    def generate(self, submissions: Iterable[Submission]) -> list[Output]:
        """Run submissions to their ends."""
        submitted = [self.submit(submission) for submission in submissions]
        return [self.listener.wait(submission) for submission in submitted]

    def free_blocks(self) -> dict[WorkerId, tuple[int, int]]:
        """Per worker: (free blocks, all blocks), audited."""
        return {member.worker: (member.blocks_free, member.blocks_capacity) for member in self.members()}

    def wait_all_free(self, within_s: float = WAIT_S) -> None:
        """Until no block is held anywhere."""
        wait_until(lambda: all(free == capacity for free, capacity in self.free_blocks().values()), within_s)

    def audit(self) -> None:
        """Every account adds up and nothing is held."""
        held = {worker: (free, most) for worker, (free, most) in self.free_blocks().items() if free != most}
        assert held == {}, f"blocks (free, all) still held: {held}"


def assert_continues(output: Output, reference: Reference) -> None:
    """The output has the reference's length, and its tokens up to the first near-tie."""
    sharp = reference.sharp_length()
    assert output.failure is None
    assert len(output.token_ids) == len(reference.tokens)
    assert output.token_ids[:sharp] == list(reference.tokens[:sharp])


def counted(engine: Engine, name: str, **labels: str) -> float:
    """The present value of one of an engine's counters; one with labels exists once it was counted."""
    value = engine.metrics.registry.get_sample_value(f"{name}_total", labels)
    assert value is not None or labels, name
    return value or 0.0


def computed_tokens(engine: Engine) -> float:
    """Tokens an engine computed in all its steps."""
    sums = [
        sample.value
        for family in engine.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_sum"
    ]
    (total,) = sums
    return total


def wait_until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Look again and again, yielding the processor; raises AssertionError when the time is over."""
    deadline_s = monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert monotonic() < deadline_s, f"not so within {within_s} s"
        pause.wait(0.005)
