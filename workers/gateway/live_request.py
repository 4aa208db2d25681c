"""One request while its client listens: its choices, its deadline, its events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anabranch.v1 import dense_pb2, inference_pb2, types_pb2
from cluster.clock import monotonic, remaining_ms
from cluster.errors import AnabranchError, Cancelled, DeadlineExceeded, Fenced, Stopping
from cluster.telemetry import logger
from workers.gateway.callers import Caller
from workers.gateway.choice import Choice, News
from workers.gateway.event_buffer import EventBuffer
from workers.gateway.metrics import GatewayMetrics
from workers.gateway.output_text import OutputText
from workers.gateway.request_plan import RequestPlan
from workers.gateway.router import Router

_log = logger("gateway.request")

_DEADLINE_MS_MAX = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all requests of a gateway share."""

    router: Router
    metrics: GatewayMetrics
    buffer_events: int
    on_settled: Callable[[LiveRequest], None]


class LiveRequest:
    """Owns the events of one stream, from the first to the one that ends it.

        live --last choice finished--> settled      the consumer gets all events
        live --failure, deadline, overflow, fenced--> settled      ... then the error
        live --close: nobody listens--> settled      everything is aborted

    Whatever ends it, its choices leave the router at that moment: aborted where nobody will come back
    for them, and left to be adopted where a resumption may.
    """

    def __init__(
        self,
        plan: RequestPlan,
        caller: Caller,
        texts: Sequence[OutputText],
        arrived_s: float,
        deadline_s: float,
        surroundings: Surroundings,
    ) -> None:
        self.plan = plan
        self.caller = caller
        self.choices = [Choice(plan, index, text, self) for index, text in enumerate(texts)]
        self.settled = False
        self._arrived_s = arrived_s
        self._deadline_s = deadline_s
        self._shared = surroundings
        self._buffer = EventBuffer(surroundings.buffer_events)
        self._open = set(self.choices)
        self._last_token_s: dict[int, float] = {}
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, deadline_s - monotonic()), self._expire)

    def start(self, stopped: Sequence[str | None], taken_over: LiveRequest | None) -> None:
        """Submit. `stopped` names, per choice, the stop string that its received tokens contain."""
        metrics, plan = self._shared.metrics, self.plan
        metrics.admitted(len(plan.prompt_token_ids))
        metrics.request_prompt_tokens.observe(len(plan.prompt_token_ids))
        started = inference_pb2.Started(
            model=plan.model,
            prompt_tokens=len(plan.prompt_token_ids),
            seed=plan.seed,
            generation=plan.generation,
        )
        self._publish(inference_pb2.GenerateResponse(started=started))
        running = []
        for choice, stop in zip(self.choices, stopped, strict=True):
            if stop is None:
                running.append(choice)
            else:
                self.on_stopped(choice, stop)
        preferred = taken_over.choices[0].link if taken_over is not None else None
        if taken_over is not None:
            taken_over.fence()
        if running:
            self._shared.router.submit(running, preferred)

    async def next_event(self) -> inference_pb2.GenerateResponse | None:
        """The stream for the client, one event at a time; None at the end. Raises what ended it."""
        return await self._buffer.get()

    def abort(self) -> None:
        """End every open choice with FINISH_REASON_ABORT."""
        for choice in tuple(self._open):
            self._shared.router.end(choice, abort=True)
            self._finish(choice, types_pb2.FINISH_REASON_ABORT)

    def close(self) -> None:
        """Nobody listens any more: abort what is open. Idempotent; after the end nothing happens."""
        self._end(Cancelled("the client hung up"), abort=True)

    def fence(self) -> None:
        """Another stream of this request took over."""
        error = Fenced("the request was resumed by another stream with a higher generation")
        self._end(error, abort=False)

    def give_up(self) -> None:
        """This gateway stops; the client may go on through another one."""
        error = Stopping("the gateway stops: resume the request through another gateway")
        self._end(error, abort=False)

    def remaining_ms(self) -> int:
        """See `ChoiceListener`."""
        return min(remaining_ms(self._deadline_s, monotonic()), _DEADLINE_MS_MAX)

    def on_news(self, choice: Choice, news: News) -> None:
        """See `ChoiceListener`."""
        if news.token_ids:
            self._time_tokens(choice.index, len(news.token_ids))
        if news.token_ids or news.text or news.shard_map is not None:
            self._publish_delta(choice, news)

    def on_finished(self, choice: Choice, final: dense_pb2.SequenceDelta) -> None:
        """See `ChoiceListener`."""
        matched_token_id = final.matched_token_id if final.HasField("matched_token_id") else None
        rest = choice.text.flush(matched_token_id)
        if rest.text:
            self._publish_delta(choice, News(len(choice.tokens), (), rest.text, (), None, None))
        reason = final.finish_reason if rest.matched_stop is None else types_pb2.FINISH_REASON_STOP
        self._finish(choice, reason, rest.matched_stop, matched_token_id)

    def on_stopped(self, choice: Choice, stop: str) -> None:
        """See `ChoiceListener`."""
        self._finish(choice, types_pb2.FINISH_REASON_STOP, stop)

    def on_failed(self, choice: Choice, error: AnabranchError) -> None:
        """See `ChoiceListener`. One lost choice ends the request: half an answer is none."""
        self._open.discard(choice)
        self._end(error, abort=True)

    def _expire(self) -> None:
        milliseconds = round((self._deadline_s - self._arrived_s) * 1000)
        self._end(DeadlineExceeded(f"the request's {milliseconds} ms are over"), abort=True)

    def _publish_delta(self, choice: Choice, news: News) -> None:
        delta = inference_pb2.TokensDelta(
            choice=choice.index,
            first_index=news.first_index,
            token_ids=news.token_ids,
            text=news.text,
            logprobs=news.logprobs,
            shard_map=news.shard_map,
        )
        self._publish(inference_pb2.GenerateResponse(delta=delta))

    def _publish(self, event: inference_pb2.GenerateResponse) -> None:
        event.request_id = self.plan.request_id
        if not self._buffer.put(event):
            self._leave(abort=True)
            self._settle("RESOURCE_EXHAUSTED")

    def _finish(
        self,
        choice: Choice,
        reason: types_pb2.FinishReason.ValueType,
        matched_stop: str | None = None,
        matched_token_id: int | None = None,
    ) -> None:
        usage = inference_pb2.Usage(
            prompt_tokens=len(self.plan.prompt_token_ids),
            completion_tokens=len(choice.tokens),
            cached_tokens=choice.cached_tokens,
        )
        finished = inference_pb2.Finished(
            choice=choice.index,
            reason=reason,
            matched_stop=matched_stop,
            matched_token_id=matched_token_id,
            usage=usage,
            timings=choice.timings,
        )
        self._shared.metrics.finished(reason, usage, choice.timings)
        self._open.discard(choice)
        self._publish(inference_pb2.GenerateResponse(finished=finished))
        if not self._open:
            self._buffer.end()
            self._settle("")

    def _end(self, error: AnabranchError, abort: bool) -> None:
        if self.settled:
            return
        self._leave(abort)
        self._buffer.end(error)
        self._settle(error.reason)

    def _leave(self, abort: bool) -> None:
        for choice in self._open:
            self._shared.router.end(choice, abort)
        self._open.clear()

    def _settle(self, reason: str) -> None:
        if self.settled:
            return
        self.settled = True
        self._timer.cancel()
        seconds = monotonic() - self._arrived_s
        self._shared.metrics.request_latency.observe(seconds)
        if reason:
            self._shared.metrics.failed(reason)
        tokens = sum(len(choice.tokens) for choice in self.choices)
        _log.info(
            "request_ended",
            request_id=self.plan.request_id,
            dense=sorted({choice.dense for choice in self.choices} - {""}),
            problem=reason,
            prompt_tokens=len(self.plan.prompt_token_ids),
            completion_tokens=tokens,
            seconds=round(seconds, 4),
        )
        self._shared.on_settled(self)

    def _time_tokens(self, index: int, count: int) -> None:
        now_s = monotonic()
        metrics = self._shared.metrics
        metrics.delivered(count)
        if index in self._last_token_s:
            metrics.inter_token_latency.observe((now_s - self._last_token_s[index]) / count)
        else:
            metrics.time_to_first_token.observe(now_s - self._arrived_s)
        self._last_token_s[index] = now_s
