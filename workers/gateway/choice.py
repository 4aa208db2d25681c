"""One continuation of a live request: the tokens already sent, and what to tell a dense worker."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from anabranch import wire
from anabranch.v1 import dense_pb2, types_pb2
from cluster.errors import AnabranchError
from cluster.types import Generation
from workers.gateway.dense_link import DenseLink
from workers.gateway.output_text import OutputText
from workers.gateway.request_plan import ATTEMPT_BITS, RequestPlan, sampling_message


class Phase(Enum):
    """Where a choice stands; see `Choice`."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class News:
    """What is new for the client in a delta: tokens from output index `first_index` on."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[types_pb2.TokenLogprobs, ...]
    shard_map: types_pb2.ShardMap | None
    matched_stop: str | None


class Gap(Exception):
    """A delta starts after the next index: tokens in between were lost, and never come."""


class ChoiceListener(Protocol):
    """The request a choice belongs to: what the router tells it. Calls must not block."""

    def remaining_ms(self) -> int:
        """Time left until the request's deadline."""
        ...

    def on_news(self, choice: Choice, news: News) -> None:
        """New tokens, text or a new shard map."""
        ...

    def on_finished(self, choice: Choice, final: dense_pb2.SequenceDelta) -> None:
        """The dense worker says that it is done."""
        ...

    def on_stopped(self, choice: Choice, stop: str) -> None:
        """A stop string matched; the dense worker was told to stop."""
        ...

    def on_failed(self, choice: Choice, error: AnabranchError) -> None:
        """It cannot go on anywhere."""
        ...


class Choice:
    """One sequence as its gateway owns it: every token delivered, in order, each once.

    WAITING --submitted to a link--> RUNNING --final delta, stop string, failure, abort--> FINISHED
       ^                                |
       +--link broke, handoff, refusal--+     (attempt + 1: the dense worker's copy is fenced)
    """

    def __init__(self, plan: RequestPlan, index: int, text: OutputText, listener: ChoiceListener) -> None:
        self.plan = plan
        self.listener = listener
        self.index = index
        self.key = plan.sequence_key(index)
        self.text = text
        self.tokens: list[int] = list(plan.received[index])
        self.shard_map = plan.shard_maps[index]
        self.phase = Phase.WAITING
        self.link: DenseLink | None = None
        self.dense = ""
        """The dense worker it was last given to."""
        self._attempt = -1
        self.breaks_without_progress = self.failures_without_progress = 0
        self.refusals = 0
        self.cached_tokens = 0
        self.timings: types_pb2.Timings | None = None
        """Its present dense worker's account, as last heard."""

    @property
    def submitted(self) -> bool:
        """Whether any dense worker was ever asked."""
        return self._attempt >= 0

    @property
    def attempts_left(self) -> int:
        """How often it can be submitted still."""
        return (1 << ATTEMPT_BITS) - 1 - self._attempt

    @property
    def generation(self) -> Generation:
        """Generation of the submission in force."""
        return self.plan.submission_generation(self._attempt)

    def submit_to(self, link: DenseLink) -> None:
        """Enter RUNNING on a link: send prompt, tokens so far, and where the KV lies."""
        assert self.phase is Phase.WAITING
        self._attempt += 1
        self.link, self.phase, self.dense = link, Phase.RUNNING, link.worker_id
        link.open_sequences += 1
        link.send(dense_pb2.ServeRequest(submission=self._submission()))

    def leave_link(self, phase: Phase) -> None:
        """Stop listening to the dense worker."""
        if self.link is not None:
            self.link.open_sequences -= 1
        self.link, self.phase = None, phase

    def _submission(self) -> dense_pb2.Submission:
        return dense_pb2.Submission(
            sequence=wire.sequence_message(self.key),
            generation=self.generation,
            prompt_token_ids=self.plan.prompt_token_ids,
            output_token_ids=self.tokens,
            sampling=sampling_message(self.plan.sampling),
            priority=self.plan.priority,
            deadline_ms=self.listener.remaining_ms(),
            tenant=self.plan.tenant,
            shard_map=self.shard_map,
        )

    def accept(self, delta: dense_pb2.SequenceDelta) -> News:
        """Take what is next in a delta; tokens already here are dropped. Raises Gap."""
        known = len(self.tokens) - delta.first_index
        if known < 0:
            raise Gap(f"{self.key}: a delta starts at {delta.first_index}, next is {len(self.tokens)}")
        if delta.HasField("shard_map"):
            self.shard_map = delta.shard_map
        if delta.HasField("timings"):
            self.timings = delta.timings
        fresh = tuple(delta.token_ids[known:])
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        piece = self.text.push(fresh)
        first_index = len(self.tokens)
        used = fresh[: piece.tokens_used]
        self.tokens.extend(used)
        if used:
            self.breaks_without_progress = self.failures_without_progress = self.refusals = 0
        return News(
            first_index=first_index,
            token_ids=used,
            text=piece.text,
            logprobs=tuple(delta.logprobs[known : known + len(used)]),
            shard_map=delta.shard_map if delta.HasField("shard_map") else None,
            matched_stop=piece.matched_stop,
        )

    def abort_message(self) -> dense_pb2.ServeRequest:
        """Asks a dense worker to end it and free its blocks."""
        abort = dense_pb2.AbortSequence(sequence=wire.sequence_message(self.key), generation=self.generation)
        return dense_pb2.ServeRequest(abort=abort)


def acknowledgement(delta: dense_pb2.SequenceDelta) -> dense_pb2.ServeRequest:
    """Tells a dense worker that its final delta arrived."""
    acknowledge = dense_pb2.Acknowledge(sequence=delta.sequence, generation=delta.generation)
    return dense_pb2.ServeRequest(acknowledge=acknowledge)
