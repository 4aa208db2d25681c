"""What the long benches run: an engine in this process, over attention workers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

from anabranch.cli.bench import step_attention
from anabranch.cli.bench.children import peak_bytes, processor_s, start
from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, DENSE_EPOCH, DENSE_WORKER, StepSettings
from cluster.errors import AnabranchError, DeadlineExceeded
from cluster.types import KvGeometry
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.remote_peer import RemotePeer
from workers.dense.sequences import Submission
from workers.dense.step_runner import StepOutcome
from workers.kernels.select import select
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller

WAIT_S = 3600.0
_CONNECT_S = 60.0


@dataclass(eq=False)
class Watch:
    """Hears of one sequence's steps and tokens, and of its end (a `Subscriber`)."""

    tokens_s: list[float] = field(default_factory=list)
    """When each token came."""
    token_ids: list[int] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    """How long each step took."""
    computed: int = 0
    """Tokens of all steps."""
    workers: set[str] = field(default_factory=set)
    """Attention workers the sequence has shards on."""
    _failure: AnabranchError | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def note(self, outcome: StepOutcome) -> None:
        """A step is over."""
        self.steps_s.append(outcome.times.wall_s)
        self.computed += sum(chunk.count for chunk in outcome.chunks)

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:  # noqa: ARG002  see `Subscriber`
        """See `Subscriber`."""
        for delta in deltas:
            self.tokens_s += [monotonic()] * len(delta.tokens)
            self.token_ids += [sampled.token_id for sampled in delta.tokens]
            self.workers |= {shard.worker for shard in delta.shard_map or ()}
            if delta.ends:
                self._failure = delta.failure
                self._over.set()

    def wait(self, say: Callable[[int], None]) -> None:
        """Until it ends, telling every second how many tokens were computed. Raises DeadlineExceeded, or what
        it failed with.
        """
        end_s = monotonic() + WAIT_S
        while not self._over.wait(1.0):
            say(self.computed)
            if monotonic() > end_s:
                raise DeadlineExceeded(f"the sequence has not ended within {WAIT_S:.0f} s")
        if self._failure is not None:
            raise self._failure


class LongCluster:
    """An engine with a lane to each of several attention workers; `long_cluster` makes one."""

    def __init__(self, settings: StepSettings, decoder: Decoder, ports: Sequence[int]) -> None:
        """`ports`: of the attention workers, in the order of their indices."""
        self.watch = Watch()
        self._config = settings.config()
        self.geometry: KvGeometry = decoder.spec.geometry(settings.dtype, self._config.attention.block_tokens)
        blocks = settings.arena_bytes // self.geometry.block_bytes
        self.members = [
            AttentionMember(
                settings.of_worker(index, ()).attention_worker,
                ATTENTION_EPOCH,
                f"127.0.0.1:{port}",
                blocks,
                blocks,
            )
            for index, port in enumerate(ports)
        ]
        kernel = select("auto", "cpu")
        self._engine = Engine(self._config, decoder, kernel, self.peer, on_step=self.watch.note)

    def peer(self, member: AttentionMember) -> RemotePeer:
        """A connection to an attention worker."""
        transports, rows = self._config.lanes.transports, rows_most(self._config, self.geometry)
        caller = Caller(DENSE_WORKER, DENSE_EPOCH, self.geometry, transports, rows)
        return RemotePeer(member, caller, self._config.security.tls)

    def run(self, submission: Submission, say: Callable[[int], None]) -> float:
        """One sequence to its end; the time it was submitted at."""
        began_s = monotonic()
        self._engine.submit(submission, self.watch, WAIT_S)
        self.watch.wait(say)
        self._engine.acknowledge(submission.key, submission.generation, WAIT_S)
        return began_s

    def __enter__(self) -> LongCluster:
        self._engine.start()
        self._engine.pool.update(self.members)
        if not self._engine.pool.wait_connected(_CONNECT_S):
            raise DeadlineExceeded("an attention worker of the bench cannot be reached")
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()


@dataclass(frozen=True, slots=True)
class Processes:
    """Ids of the processes of a running bench, this one first."""

    ids: tuple[int, ...]

    def peaks_bytes(self) -> list[float]:
        """The most memory each had resident so far."""
        return [float(peak_bytes(process_id)) for process_id in self.ids]

    def processor_s(self) -> list[float]:
        """Seconds of processor time each has taken so far: what remains comparable on a busy machine."""
        return [processor_s(process_id) for process_id in self.ids]


@contextlib.contextmanager
def long_cluster(settings: StepSettings, decoder: Decoder) -> Iterator[tuple[LongCluster, Processes]]:
    """A running cluster; every process ends with it. The workers take the machine's cores in turn."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        ids, ports = [os.getpid()], []
        for index in range(settings.attention_workers):
            told = settings.of_worker(index, (cores[index % len(cores)],))
            process, line = start(stack, step_attention.__name__, told)
            ids.append(process.pid)
            ports.append(int(line))
        with LongCluster(settings, decoder, ports) as cluster:
            yield cluster, Processes(tuple(ids))
