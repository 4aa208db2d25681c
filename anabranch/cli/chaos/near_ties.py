"""How close a choice of a token was: the same engine in this process, with the cache beside it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from anabranch.cli.chaos.schedule import Request
from cluster.config import Config, TierConfig
from cluster.sampling import SamplingParameters
from cluster.types import Epoch, SequenceKey, WorkerId
from workers.attention.core import AttentionCore
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.sequences import Submission
from workers.kernels.select import select

NEAR_TIE = 1e-3
"""A gap between (perturbed) logits, or to a boundary, under which rounding may decide."""

_LOCAL = WorkerId("dense-0-local")
_WAIT_S = 60.0


class _First:
    """Waits for a sequence's first token (a `Subscriber`)."""

    def __init__(self) -> None:
        self.gap: float | None = None
        self.over = threading.Event()

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:  # noqa: ARG002  see `Subscriber`
        """See `Subscriber`."""
        for delta in deltas:
            if delta.tokens and self.gap is None:
                self.gap = delta.tokens[0].gap
            if delta.tokens or delta.ends:
                self.over.set()


def gap_at(model: Path, request: Request, tokens: Sequence[int]) -> float:
    """How far, in logits, the choice of the output token behind `tokens` was from being another."""
    decoder = Decoder.from_folder(model)
    config = Config.model_validate(
        {"model": {"path": str(model)}, "dense": {"local_arena": "64MiB"}, "attention": {"replicas": 0}}
    )
    geometry = decoder.spec.geometry(config.model.dtype, config.attention.block_tokens)
    tier = TierConfig(arena=config.dense.local_arena)
    with AttentionCore(config.attention, tier, geometry, _LOCAL, Epoch(1)) as core:
        engine = Engine(config, decoder, select("auto", "cpu"), lambda _member: core.peer())
        engine.start()
        blocks = core.arena.blocks
        engine.pool.update([AttentionMember(_LOCAL, Epoch(1), "", blocks, blocks, is_local=True)])
        engine.pool.wait_connected(_WAIT_S)
        first = _First()
        engine.submit(_submission(request, tokens), first, _WAIT_S)
        first.over.wait(_WAIT_S)
        engine.stop()
    assert first.gap is not None, "the engine said nothing"
    return first.gap


def _submission(request: Request, tokens: Sequence[int]) -> Submission:
    most = len(tokens) + 1
    sampling = SamplingParameters(max_tokens=most, ignore_eos=True, **request.sampling)
    return Submission(
        key=SequenceKey(request.name),
        generation=2,
        prompt=request.prompt,
        output=tuple(tokens),
        sampling=sampling,
        seed=request.sampling["seed"],
        max_tokens=most,
        priority=0,
        deadline_s=monotonic() + _WAIT_S,
        tenant="",
    )
