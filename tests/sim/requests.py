"""Clients and gateways: what was asked, what came, and where it goes on. The rules are the router's.

Tokens are compared as they arrive with what the model says by definition. A request ends whole, or by its
deadline, which its dense worker is the first to notice, or its gateway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.config_values import Serves
from cluster.errors import AnabranchError, DeadlineExceeded, ResourceExhausted, Unavailable
from cluster.sampling import SamplingParameters
from cluster.types import SequenceKey, ShardRef
from tests.sim.watch import Violation, Watch
from tests.sim.world import Wire, World
from workers.dense.deltas import Delta
from workers.dense.engine import Engine
from workers.dense.sequences import Submission

DEADLINE_S = 10_000.0
"""Of a request that has to end whole."""
PATIENCE_S = 3.0
"""Beyond a deadline, of a gateway that leaves it to dense workers: a freeze that nobody noticed, and four
messages of the slowest (see `World.latency`).
"""
_OFFERS_MOST = 6
"""As the router's: see `Router._offers`."""


class DenseProcess(Protocol):
    """What a gateway knows of one life of a dense worker."""

    name: str
    alive: bool
    engine: Engine
    serves: Serves

    @property
    def life(self) -> str:
        """A name that no other life has."""
        ...

    @property
    def answers(self) -> bool:
        """Whether it is alive and not frozen."""
        ...


@dataclass(eq=False)
class Request:
    """One request as its client and its gateway hold it."""

    key: SequenceKey
    prompt: tuple[int, ...]
    expected: list[int]
    priority: int
    tenant: str
    deadline_s: float
    tokens: list[int] = field(default_factory=list)
    shard_map: tuple[ShardRef, ...] | None = None
    generation: int = 0
    link: Link | None = None
    submitted_s: float = 0.0
    refusals: int = 0
    gateway: Gateway | None = None
    is_over: bool = False

    def submission(self, now_s: float) -> Submission:
        """What the next dense worker is told, with the time left in place of a deadline."""
        count = len(self.expected)
        return Submission(
            self.key,
            self.generation,
            self.prompt,
            tuple(self.tokens),
            SamplingParameters(max_tokens=count, temperature=0.0, ignore_eos=True, seed=0),
            0,
            count,
            self.priority,
            self.deadline_s - now_s,
            self.tenant,
            self.shard_map,
        )

    def take(self, delta: Delta) -> None:
        """The next tokens. Raises Violation for a wrong or a missing one."""
        known = len(self.tokens) - delta.first_index
        if known < 0:
            raise Violation(f"{self.key}: a delta begins at {delta.first_index}, next is {len(self.tokens)}")
        if delta.shard_map is not None:
            self.shard_map = delta.shard_map
        for sampled in delta.tokens[known:]:
            index = len(self.tokens)
            if index >= len(self.expected):
                raise Violation(f"{self.key}: more tokens than were asked for")
            if sampled.token_id != self.expected[index]:
                raise Violation(
                    f"{self.key}: token {index} is {sampled.token_id}, not {self.expected[index]}"
                )
            self.tokens.append(sampled.token_id)
            self.refusals = 0


class Link:
    """A gateway's stream to one life of a dense worker; a `Subscriber`."""

    def __init__(self, world: World, watch: Watch, gateway: Gateway, dense: DenseProcess) -> None:
        self._world = world
        self._watch = watch
        self.gateway = gateway
        self.dense = dense
        self.open = True
        self.hands_over = False
        self._down = Wire(world, lambda: self.open and dense.alive)
        self._up = Wire(world, lambda: self.open and gateway.alive)

    @property
    def usable(self) -> bool:
        """Whether new sequences may be sent."""
        return self.open and not self.hands_over

    def deliver(self, step: int, deltas: Sequence[Delta]) -> None:
        """See `Subscriber`."""
        for delta in deltas:
            self._watch.tells(self.dense.life, delta)
        if self.open:
            self._up.send(lambda: self.gateway.take(self, deltas))

    def submit(self, submission: Submission) -> None:
        """Send a sequence; its time left begins to pass there when it arrives."""

        def arrive() -> None:
            deadline_s = self._world.now_s + submission.deadline_s
            self.dense.engine.submit(replace(submission, deadline_s=deadline_s), self, 0.0)

        self._down.send(arrive)

    def acknowledge(self, delta: Delta) -> None:
        """A final delta arrived."""
        self._down.send(lambda: self.dense.engine.acknowledge(delta.key, delta.generation, 0.0))

    def abort(self, request: Request) -> None:
        """Nobody wants it any more."""
        generation = request.generation
        self._down.send(lambda: self.dense.engine.abort(request.key, generation, 0.0))

    def cut(self) -> None:
        """The stream breaks, and its worker notices a little later."""
        if self.open:
            self.open = False
            wire = Wire(self._world, lambda: self.dense.alive)
            wire.send(lambda: self.dense.engine.disconnect(self))


class Gateway:
    """Routes requests to dense workers and goes on elsewhere when one cannot. Ends them by their deadline, at
    once or some `patience_s` later, when their dense workers should have done so.
    """

    def __init__(self, world: World, watch: Watch, name: str) -> None:
        self.name = name
        self.alive = True
        self.requests: dict[SequenceKey, Request] = {}
        self.links: dict[str, Link] = {}
        self.patience_s = world.rng.choice((0.0, PATIENCE_S))
        self._watch = watch
        self._world = world

    def connect(self, dense: DenseProcess) -> None:
        """A life of a dense worker was heard of."""
        present = self.links.get(dense.name)
        if present is not None and present.dense is dense and present.open:
            return
        if present is not None:
            self.lose(present)
        self.links[dense.name] = Link(self._world, self._watch, self, dense)
        self.route()

    def accept(self, request: Request) -> None:
        """A client asks, or goes on after another gateway."""
        request.gateway, request.link = self, None
        self.requests[request.key] = request
        left_s = request.deadline_s + self.patience_s - self._world.now_s
        self._world.after(max(0.0, left_s), lambda: self._expire(request))
        self.route()

    def route(self) -> None:
        """Send what waits, if anybody takes it."""
        for request in list(self.requests.values()):
            if request.link is None and not request.is_over:
                self._submit(request, None, None)

    def lose(self, link: Link) -> None:
        """A stream broke: what was on it goes elsewhere."""
        link.cut()
        if self.links.get(link.dense.name) is link:
            del self.links[link.dense.name]
        for request in list(self.requests.values()):
            if request.link is link:
                self._submit(request, link, None)

    def abort(self, request: Request) -> None:
        """Its client has gone."""
        if request.link is not None:
            request.link.abort(request)
        self.end(request, "is aborted")

    def take(self, link: Link, deltas: Sequence[Delta]) -> None:
        """News of sequences."""
        for delta in deltas:
            request = self.requests.get(delta.key)
            if request is None or request.link is not link or request.generation != delta.generation:
                if delta.finish is not None or delta.failure is not None:
                    link.acknowledge(delta)
                continue
            request.take(delta)
            if delta.finish is not None:
                self._finish(link, request, delta)
            elif delta.handoff is not None:
                link.hands_over |= not delta.handoff.worker_stays
                self._world.note(f"{delta.key} is handed over by {link.dense.name}")
                self._submit(request, link, delta.handoff.target)
            elif delta.failure is not None:
                self._failed(link, request, delta, delta.failure)

    def _finish(self, link: Link, request: Request, delta: Delta) -> None:
        if request.tokens != request.expected:
            raise Violation(f"{request.key}: finished after {len(request.tokens)} tokens")
        link.acknowledge(delta)
        self.end(request, "is done")

    def _expire(self, request: Request) -> None:
        if not self.alive or self.requests.get(request.key) is not request:
            return
        if request.link is not None:
            if self.patience_s > 0 and request.submitted_s <= request.deadline_s:
                raise Violation(f"{request.key}: {request.link.dense.name} let its deadline pass")
            request.link.abort(request)
        self.end(request, "is late")

    def end(self, request: Request, how: str) -> None:
        """Its client has all it will get."""
        self._world.note(f"{request.key} {how}")
        request.is_over = True
        self.requests.pop(request.key, None)

    def _failed(self, link: Link, request: Request, delta: Delta, error: AnabranchError) -> None:
        if isinstance(error, DeadlineExceeded) and self._world.now_s >= request.deadline_s:
            link.acknowledge(delta)
            self.end(request, "is late, its dense worker says")
        elif isinstance(error, (Unavailable, ResourceExhausted)):
            self._refused(link, request, error)
        else:
            raise Violation(f"{request.key} fails: {type(error).__name__}: {error.message}")

    def _refused(self, link: Link, request: Request, error: AnabranchError) -> None:
        self._world.note(f"{request.key} is refused by {link.dense.name}: {error.message}")
        request.refusals += 1
        others = sum(each.usable for each in self.links.values() if each is not link)
        unfit_first = request.refusals >= (_OFFERS_MOST if request.tokens else others)
        request.link = None

        def again() -> None:
            if self.alive and self.requests.get(request.key) is request and request.link is None:
                self._submit(request, link, None, unfit_first=unfit_first)

        self._world.after(self._world.rng.uniform(0.05, 0.5), again)

    def _submit(
        self, request: Request, avoid: Link | None, target: str | None, *, unfit_first: bool = False
    ) -> None:
        request.link = self._choose(request, avoid, target, unfit_first=unfit_first)
        if request.link is None:
            return
        request.submitted_s = self._world.now_s
        request.generation += 1
        self._world.note(
            f"{request.key} goes to {request.link.dense.name} as {request.generation}, "
            f"{len(request.tokens)} tokens known"
        )
        request.link.submit(request.submission(self._world.now_s))

    def _choose(
        self, request: Request, avoid: Link | None, target: str | None, *, unfit_first: bool
    ) -> Link | None:
        """By the rules of `DenseLinks.choose`, but for the load."""
        unfit = "prefill" if request.tokens else "decode"
        usable = [link for link in self.links.values() if link.usable]

        def undesired(link: Link) -> tuple[bool, bool]:
            is_unfit, is_avoided = link.dense.serves == unfit, link is avoid
            return (is_avoided, not is_unfit) if unfit_first else (is_unfit, is_avoided)

        named = [link for link in usable if link.dense.name == target]
        least = min(map(undesired, usable), default=None)
        best = named or [link for link in usable if undesired(link) == least]
        return self._world.rng.choice(best) if best else None
