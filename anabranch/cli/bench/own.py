"""Our own contender of `anabranch bench serve`: the engine with its cache in the process. See `contender`."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from itertools import count, pairwise
from time import monotonic
from typing import Any

import torch

from cluster.config import Config
from cluster.sampling import SamplingParameters
from cluster.types import Epoch, SequenceKey, WorkerId
from workers.attention.core import AttentionCore
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.sequences import Submission
from workers.kernels.select import select
from workers.peer import AttentionPeer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEADLINE_S = 3600.0
_LOCAL = WorkerId("dense-0-local")


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
    torch.set_num_threads(settings["threads"])
    config = _config(settings)
    decoder = Decoder.from_folder(settings["model"], _DTYPES[settings["dtype"]])
    geometry = decoder.spec.geometry(config.model.dtype, config.attention.block_tokens)
    with AttentionCore(config.attention, config.dense.local_arena, geometry, _LOCAL, Epoch(1)) as core:

        def connect(_member: AttentionMember) -> AttentionPeer:
            return core.peer()

        kernel = select(config.attention.kernel, config.dense.device)
        engine = Engine(config, decoder, kernel, connect)
        engine.start()
        blocks = core.arena.blocks
        engine.pool.update([AttentionMember(_LOCAL, Epoch(1), "", blocks, blocks, is_local=True)])
        engine.pool.wait_connected(_DEADLINE_S)
        print(
            json.dumps({"ready": {"kernel": kernel.name, "block_tokens": geometry.block_tokens}}), flush=True
        )
        names = count()
        for line in sys.stdin:
            print(json.dumps(_serve(engine, json.loads(line), names)), flush=True)
        engine.stop()


def _config(settings: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "model": {"path": settings["model"], "dtype": settings["dtype"]},
            "dense": {
                "threads": settings["threads"],
                "local_arena": settings["arena_bytes"],
                "step_tokens": settings["step_tokens"],
            },
            "attention": {"replicas": 0, "prefix_sharing": False},
        }
    )


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
