"""The dense worker of `anabranch bench step`: a real engine over an attention worker, or with its own cache.

    python -m anabranch.cli.bench.step_dense SETTINGS

Reads a `Turn` as a line of JSON and answers with one: a list of steps, each the seconds of its parts.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from anabranch.cli.bench import filling
from anabranch.cli.bench.filling import Filler
from anabranch.cli.bench.remote import remote_member, remote_peer
from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, LOCAL_WORKER, StepSettings, Turn
from anabranch.cli.bench.timeline import Trace, TracedLane
from cluster.config import TierConfig
from cluster.errors import AnabranchError, DeadlineExceeded
from cluster.sampling import SamplingParameters
from cluster.types import SequenceKey, ShardRef
from workers.attention.core import AttentionCore
from workers.cores import keep_to
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.sequences import Submission
from workers.dense.step_runner import StepOutcome
from workers.kernels.select import select
from workers.peer import AttentionPeer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WAIT_S = 120.0
_WARM_UP_STEPS = 4
_TRACED_STEPS = 2

Step = dict[str, float]


@dataclass(eq=False)
class Steps:
    """Hears of every step, and of every sequence's end (a `Subscriber`)."""

    batch: int = 0
    found: list[Step] = field(default_factory=list)
    _engine: Engine | None = None
    _left: int = 0
    _failure: AnabranchError | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _last_s: float = 0.0
    trace: Trace = field(default_factory=Trace)

    def begin(self, engine: Engine, batch: int) -> None:
        """Listen to a new batch."""
        self.batch, self.found, self._left, self._engine = batch, [], batch, engine
        self._over.clear()

    def wait(self) -> None:
        """Until every sequence of the batch has ended. Raises DeadlineExceeded, or what one failed with."""
        if not self._over.wait(_WAIT_S):
            raise DeadlineExceeded(f"{self._left} of {self.batch} sequences have not ended")
        if self._failure is not None:
            raise self._failure

    def note(self, outcome: StepOutcome) -> None:
        """One step; only those in which the whole batch decodes count."""
        now_s, last_s = monotonic(), self._last_s
        self._last_s = now_s
        self.trace.end_step()
        if len(outcome.sampled) == self.batch == len(outcome.chunks):
            times = outcome.times
            self.found.append(
                {
                    "wall_s": now_s - last_s,  # from end to end: what lies between two runs counts too
                    "dense_s": times.dense_s + now_s - last_s - times.wall_s,
                    "head_s": times.head_s + now_s - last_s - times.wall_s,
                    "waited_s": times.waited_s,
                    "sent_s": times.sent_s,
                    "attention_s": times.attention_s,
                    "lane_s": times.lane_s,
                    "micro_batches": outcome.micro_batches,
                }
            )

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:  # noqa: ARG002
        """See `Subscriber`: acknowledge ends."""
        assert self._engine is not None
        for delta in deltas:
            if delta.failure is not None:
                self._failure = delta.failure
                self._over.set()
            if delta.finish is not None:
                self._engine.acknowledge(delta.key, delta.generation, _WAIT_S)
                self._left -= 1
        if self._left == 0:
            self._over.set()


class DenseBench:
    """An engine with one attention worker, and the means to fill that one's cache."""

    def __init__(self, settings: StepSettings) -> None:
        self._settings = settings
        self._config = settings.config()
        self._decoder = Decoder.from_folder(settings.model, _DTYPES[settings.dtype])
        self._geometry = self._decoder.spec.geometry(settings.dtype, self._config.attention.block_tokens)
        self._steps = Steps()
        self._numbers = itertools.count()
        self._core: AttentionCore | None = None
        if settings.is_monolithic:
            tier = TierConfig(arena=settings.arena_bytes)
            self._core = AttentionCore(
                self._config.attention, tier, self._geometry, LOCAL_WORKER, ATTENTION_EPOCH
            )
        self._member = self._find_member()
        kernel = select("auto", "cpu")
        self._engine = Engine(self._config, self._decoder, kernel, self._connect, on_step=self._steps.note)
        self._engine.start()
        self._engine.pool.update([self._member])
        assert self._engine.pool.wait_connected(_WAIT_S), "no lane to the attention worker"
        self._filler = Filler(self._peer(), self._geometry)

    def run(self, turn: Turn) -> dict[str, Any]:
        """Steps of a batch, without the first ones; and the seconds of its matrix products, and of all that
        it computes beside attention, alone.
        """
        keys = [SequenceKey(f"bench-{next(self._numbers)}") for _ in range(turn.batch)]
        steps = turn.steps + _WARM_UP_STEPS
        shards = self._filler.fill(keys, turn.context_tokens, steps + 2)
        self._steps.begin(self._engine, turn.batch)
        for key, shard in zip(keys, shards, strict=True):
            self._engine.submit(_submission(key, shard, turn.context_tokens, steps), self._steps, _WAIT_S)
        self._steps.wait()
        found = self._steps.found[_WARM_UP_STEPS:]
        rows = max(1, round(turn.batch / (found[-1]["micro_batches"] if found else 1)))
        products = [self._products_s(rows) * turn.batch / rows for _ in found]
        computed = [self._computed_s(rows) * turn.batch / rows for _ in found]
        spans = self._steps.trace.last_steps(_TRACED_STEPS) if turn.traced else []
        return {"steps": found, "products_s": products, "computed_s": computed, "trace": spans}

    def close(self) -> None:
        """End the engine, and the cache if it is here."""
        self._filler.close()
        self._engine.stop()
        if self._core is not None:
            self._core.close()

    def _products_s(self, rows: int) -> float:
        """Seconds of all matrix products of one step over `rows`, one after the other."""
        with torch.inference_mode():
            inputs = {
                width: torch.ones(rows, width, dtype=self._decoder.dtype)
                for width in {linear.inputs for linear in self._decoder.projections()}
            }
            began_s = monotonic()
            for linear in self._decoder.projections():
                linear(inputs[linear.inputs])
            return monotonic() - began_s

    def _computed_s(self, rows: int) -> float:
        """Seconds of what one decoding step computes over `rows` beside attention: layers, merges, head."""
        decoder, sizes, dtype = self._decoder, self._geometry, self._decoder.dtype
        hidden, normed = (torch.ones(rows, decoder.spec.hidden_size, dtype=dtype) for _ in range(2))
        norm = torch.ones(decoder.spec.hidden_size, dtype=dtype)
        angles = torch.ones(rows, 1, sizes.head_size // 2, dtype=dtype)
        shard = torch.ones(rows, sizes.query_heads, sizes.head_size), torch.ones(rows, sizes.query_heads)
        with torch.inference_mode():
            began_s = monotonic()
            for layer in decoder.layers:
                query = layer.query(normed, (angles, angles))
                own = layer.key_value(normed, (angles, angles))
                attended = decoder.operators.merge_own(query, *own, 1.0, shard)
                hidden, normed = layer.absorb(hidden, attended, norm)
            decoder.logits(normed)
            return monotonic() - began_s

    def _find_member(self) -> AttentionMember:
        if self._core is not None:
            blocks = self._core.arena.blocks
            return AttentionMember(LOCAL_WORKER, ATTENTION_EPOCH, "", blocks, blocks, is_local=True)
        return remote_member(self._settings, self._geometry)

    def _peer(self) -> AttentionPeer:
        """A connection to the attention worker."""
        if self._core is not None:
            return self._core.peer()
        return remote_peer(self._settings, self._geometry)

    def _connect(self, _member: AttentionMember) -> AttentionPeer:
        peer = self._peer()
        open_lane = peer.open_lane
        peer.open_lane = lambda: TracedLane(open_lane(), self._steps.trace)  # type: ignore[method-assign]
        return peer


def _submission(key: SequenceKey, shard: ShardRef, context_tokens: int, steps: int) -> Submission:
    """A take-over of a filled sequence: it decodes at once."""
    parameters = SamplingParameters(max_tokens=steps, temperature=0.0, ignore_eos=True, seed=0)
    return Submission(
        key,
        filling.FIRST_GENERATION + 1,
        filling.token_ids(key, context_tokens),
        (),
        parameters,
        0,
        steps,
        0,
        monotonic() + _WAIT_S,
        "bench",
        (shard,),
    )


def main(settings: StepSettings) -> None:
    """Answer turns until the parent closes our standard input."""
    keep_to(settings.dense_cores)
    torch.set_num_threads(len(settings.dense_cores))
    bench = DenseBench(settings)
    print("{}", flush=True)
    for line in sys.stdin:
        print(json.dumps(bench.run(Turn(**json.loads(line)))), flush=True)
    bench.close()


if __name__ == "__main__":
    main(StepSettings.from_json(sys.argv[1]))
