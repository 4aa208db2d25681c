"""Our own contender of `anabranch bench serve`: the engine with its cache in the process, or with an
attention worker in another on a core of its own. See `contender`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from time import monotonic
from typing import Any

import torch

from anabranch.cli.bench import step_attention
from anabranch.cli.bench.children import start
from anabranch.cli.bench.remote import remote_member, remote_peer
from anabranch.cli.bench.step_settings import ATTENTION_EPOCH, LOCAL_WORKER, StepSettings
from cluster.config import TierConfig
from cluster.sampling import SamplingParameters
from cluster.types import SequenceKey
from workers.attention.core import AttentionCore
from workers.cores import keep_to
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.sequences import Submission
from workers.kernels.select import select
from workers.peer import AttentionPeer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEADLINE_S = 3600.0


class Batch:
    """Sequences that were submitted together, and when each step brought what (a `Subscriber`)."""

    def __init__(self, engine: Engine, size: int) -> None:
        self._engine = engine
        self._size = size
        self._began_s = monotonic()
        self._started: set[SequenceKey] = set()
        self._ended = 0
        self._over = threading.Event()
        self._full_steps: list[float] = []
        self.prefill_s = 0.0

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:  # noqa: ARG002  see `Subscriber`
        """See `Subscriber`."""
        now_s = monotonic()
        grown = {delta.key for delta in deltas if delta.tokens}
        if len(self._started) == self._size and len(grown) == self._size:
            self._full_steps.append(now_s)
        self._started |= grown
        if len(self._started) == self._size and self.prefill_s == 0.0:
            self.prefill_s = now_s - self._began_s
        for delta in deltas:
            assert delta.failure is None, delta.failure
            if delta.ends:
                self._engine.acknowledge(delta.key, delta.generation, _DEADLINE_S)
                self._ended += 1
        if self._ended == self._size:
            self._over.set()

    def wait(self) -> dict[str, Any]:
        """Until all have ended; the contender's answer."""
        self._over.wait(_DEADLINE_S)
        return {
            "prefill_s": self.prefill_s,
            "step_s": [later - earlier for earlier, later in pairwise(self._full_steps)],
        }


def main(settings: dict[str, Any]) -> None:
    """Serve batches until standard input ends."""
    with contextlib.ExitStack() as stack:
        engine, told = _engine(stack, settings)
        print(json.dumps({"ready": told}), flush=True)
        names = count()
        for line in sys.stdin:
            print(json.dumps(_serve(engine, json.loads(line), names)), flush=True)
        engine.stop()


def _engine(stack: contextlib.ExitStack, settings: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """An engine that may begin, and what made it what it is."""
    step = _settings(stack, settings)
    keep_to(step.dense_cores)
    torch.set_num_threads(len(step.dense_cores))
    config = step.config()
    decoder = Decoder.from_folder(step.model, _DTYPES[settings["dtype"]])
    geometry = decoder.spec.geometry(step.dtype, config.attention.block_tokens)
    connect: Callable[[AttentionMember], AttentionPeer]
    if step.is_monolithic:
        tier = TierConfig(arena=step.arena_bytes)
        core = AttentionCore(config.attention, tier, geometry, LOCAL_WORKER, ATTENTION_EPOCH)
        stack.enter_context(core)
        blocks = core.arena.blocks
        member = AttentionMember(LOCAL_WORKER, ATTENTION_EPOCH, "", blocks, blocks, is_local=True)
        connect = lambda _member: core.peer()  # noqa: E731
    else:
        member = remote_member(step, geometry)
        connect = lambda _member: remote_peer(step, geometry)  # noqa: E731
    kernel = select(config.attention.kernel, config.dense.device)
    engine = Engine(config, decoder, kernel, connect)
    engine.start()
    engine.pool.update([member])
    engine.pool.wait_connected(_DEADLINE_S)
    cores = {"dense_cores": step.dense_cores, "attention_cores": step.attention_cores}
    return engine, {"kernel": kernel.name, "block_tokens": geometry.block_tokens, **cores}


def _settings(stack: contextlib.ExitStack, settings: dict[str, Any]) -> StepSettings:
    """As many cores as threads for everything; or, disaggregated, one for dense work and one for attention,
    in a process that ends with the stack.
    """
    cores = sorted(os.sched_getaffinity(0))
    common = StepSettings(
        settings["model"],
        tuple(cores[: settings["threads"]]),
        arena_bytes=settings["arena_bytes"],
        dtype=settings["dtype"],
        step_tokens=settings["step_tokens"],
        prefix_sharing=False,
    )
    if settings.get("mode", "monolithic") == "monolithic":
        return common
    split = replace(common, dense_cores=(cores[0],), attention_cores=(cores[1],))
    _, port = start(stack, step_attention.__name__, split)
    return replace(split, attention_port=int(port))


def _serve(engine: Engine, work: dict[str, Any], names: count[int]) -> dict[str, Any]:
    prompts, tokens = work["prompts"], work["steps"] + 2
    sampling = SamplingParameters(temperature=0.0, ignore_eos=True, seed=0, max_tokens=tokens)
    batch = Batch(engine, len(prompts))
    for prompt in prompts:
        key, deadline_s = SequenceKey(f"bench-{next(names)}"), monotonic() + _DEADLINE_S
        submission = Submission(key, 1, tuple(prompt), (), sampling, 0, tokens, 0, deadline_s, "")
        engine.submit(submission, batch, _DEADLINE_S)
    return batch.wait()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
