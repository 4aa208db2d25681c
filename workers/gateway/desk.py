"""Where every request enters, whichever API it came by: who calls, may it, and is there room."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from anabranch.v1 import inference_pb2
from cluster.clock import monotonic
from cluster.config import GatewayConfig
from cluster.errors import ResourceExhausted, Stopping
from cluster.telemetry import logger
from workers.gateway.admission import Admission, require_successor
from workers.gateway.callers import Caller, CallerDirectory
from workers.gateway.live_request import LiveRequest, Surroundings
from workers.gateway.metrics import GatewayMetrics
from workers.gateway.output_text import OutputText
from workers.gateway.request_plan import RequestPlan, cluster_request_id
from workers.gateway.router import Router
from workers.gateway.served_model import ServedModel
from workers.gateway.text_work import TextWork

_log = logger("gateway.desk")


class Desk:
    """Owns the requests open at this gateway: at most `max_streams`, each id once."""

    def __init__(
        self,
        model: ServedModel,
        limits: GatewayConfig,
        callers: CallerDirectory,
        router: Router,
        metrics: GatewayMetrics,
        work: TextWork,
    ) -> None:
        self.model = model
        self.draining = False
        self._limits = limits
        self._metrics = metrics
        self._callers = callers
        self._work = work
        self._admission = Admission(model, limits, self._work)
        self._surroundings = Surroundings(router, metrics, limits.stream_buffer_events, self._forget)
        self._live: dict[str, LiveRequest] = {}
        self._opening: Counter[str] = Counter()
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def streams_open(self) -> int:
        """Requests open or about to be."""
        return len(self._live) + self._opening.total()

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an `authorization` header. Raises Unauthenticated."""
        with self._metrics.counting_refusals():
            return self._callers.authenticate(authorization)

    async def open(
        self, request: inference_pb2.GenerateRequest, caller: Caller, time_left_s: float | None
    ) -> LiveRequest:
        """Admit a request and submit it; the caller consumes its events and then calls `close`.

        Raises InvalidRequest, NotFound, AlreadyExists, PermissionDenied, ResourceExhausted, Unavailable.
        """
        with self._metrics.counting_refusals():
            return await self._admit(request, caller, time_left_s)

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> list[int]:
        """Token ids of text or chat. Raises InvalidRequest, NotFound."""
        return await self._admission.tokenize(request)

    def find(self, request_id: str, caller: Caller) -> LiveRequest | None:
        """The caller's live request of this id; another tenant's is not found."""
        return self._live.get(cluster_request_id(caller.tenant, request_id))

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, wait for the open ones, and give up what is left after `grace_s`."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            _log.warning("drain_grace_over", streams=self.streams_open)
        for live in tuple(self._live.values()):
            live.give_up()

    async def _admit(
        self, request: inference_pb2.GenerateRequest, caller: Caller, time_left_s: float | None
    ) -> LiveRequest:
        arrived_s = monotonic()
        self._require_room(caller)
        self._opening[caller.tenant] += 1
        self._empty.clear()
        try:
            plan = await self._admission.admit(request, caller)
            texts, stopped = await self._replay(plan)
        finally:
            self._opening[caller.tenant] -= 1
            self._note_if_empty()
        if time_left_s is None:
            time_left_s = self._limits.default_deadline_ms / 1000
        return self._start(plan, caller, texts, stopped, arrived_s, arrived_s + time_left_s)

    def _require_room(self, caller: Caller) -> None:
        if self.draining:
            raise Stopping("the gateway drains: use another gateway")
        of_tenant = sum(live.plan.tenant == caller.tenant for live in self._live.values())
        caller.require_streams(of_tenant + self._opening[caller.tenant])
        if self.streams_open >= self._limits.max_streams:
            raise ResourceExhausted(f"{self._limits.max_streams} requests are open here already: back off")

    async def _replay(self, plan: RequestPlan) -> tuple[list[OutputText], list[str | None]]:
        """The choices' texts, brought to where a resuming client is, and the stops met on the way."""
        texts = [OutputText(self.model.tokenizer, plan) for _ in range(plan.choices)]
        if not any(plan.received):
            return texts, [None] * plan.choices

        def replay() -> list[str | None]:
            return [text.push(tokens).matched_stop for text, tokens in zip(texts, plan.received, strict=True)]

        return texts, await self._work.run(replay)

    def _start(
        self,
        plan: RequestPlan,
        caller: Caller,
        texts: Sequence[OutputText],
        stopped: Sequence[str | None],
        arrived_s: float,
        deadline_s: float,
    ) -> LiveRequest:
        """Register and submit; from check to entry nothing else runs on the loop."""
        if self.draining:
            raise Stopping("the gateway drains: use another gateway")
        name = plan.sequence_key(0).request_id
        before = self._live.get(name)
        if before is not None:
            require_successor(plan.generation, before.plan.generation, plan.request_id)
        live = LiveRequest(plan, caller, texts, arrived_s, deadline_s, self._surroundings)
        self._live[name] = live
        self._empty.clear()
        live.start(stopped, before)
        return live

    def _forget(self, live: LiveRequest) -> None:
        name = live.plan.sequence_key(0).request_id
        if self._live.get(name) is live:
            del self._live[name]
        self._note_if_empty()

    def _note_if_empty(self) -> None:
        if self.streams_open == 0:
            self._empty.set()
