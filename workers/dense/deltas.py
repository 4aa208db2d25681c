"""What an engine tells a gateway, as values; `wire` gives them their protobuf form."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import AnabranchError
from cluster.types import SequenceKey, ShardRef, WorkerId
from workers.dense.sampler import Sampled


class FinishReason(enum.Enum):
    """Why an output ended well."""

    STOP = enum.auto()
    """An end-of-sequence token or one of `stop_token_ids`, which is not delivered."""
    LENGTH = enum.auto()
    """`max_tokens` or the model's context is reached."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the seconds of one sequence went; fields as in `anabranch.v1.Timings`."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    dense_seconds: float
    attention_seconds: float
    lane_seconds: float
    waited_seconds: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Handoff:
    """A sequence leaves for another dense worker: `target`, or whichever its gateway chooses. Where not
    `worker_stays`, this worker leaves too.
    """

    worker_stays: bool = False
    target: WorkerId | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one sequence. At most one of `finish`, `failure` and `handoff` is set, and only once."""

    key: SequenceKey
    generation: int
    """The gateway's, not the wire generation of attention workers."""
    first_index: int
    """Output index of the first of `tokens`."""
    tokens: tuple[Sampled, ...] = ()
    shard_map: tuple[ShardRef, ...] | None = None
    finish: FinishReason | None = None
    matched_token_id: int | None = None
    failure: AnabranchError | None = None
    timings: Timings | None = None
    """So far: with tokens and with the end. A gateway that ends the sequence by itself has the last ones."""
    handoff: Handoff | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV was found in the pool."""

    @property
    def ends(self) -> bool:
        """Whether this is the sequence's last."""
        return self.handoff is not None or self.finish is not None or self.failure is not None


class Subscriber(Protocol):
    """Whoever submitted sequences: one gateway's stream."""

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """Take one step's deltas of all its sequences. Called by the engine's thread: never blocks."""
        ...


class Outbox:
    """Deltas of the present step, one message per subscriber. Used by the engine's thread alone."""

    def __init__(self) -> None:
        self._pending: dict[Subscriber, list[Delta]] = {}

    def put(self, subscriber: Subscriber, delta: Delta) -> None:
        """Add a delta; those of one subscriber keep their order."""
        self._pending.setdefault(subscriber, []).append(delta)

    def flush(self, step: int) -> None:
        """Deliver everything."""
        pending, self._pending = self._pending, {}
        for subscriber, deltas in pending.items():
            subscriber.deliver(step, deltas)
