"""Which dense worker runs which sequence, and what happens when it cannot go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from anabranch import wire
from anabranch.v1 import control_pb2, dense_pb2, types_pb2
from cluster import rpc
from cluster.config import Config
from cluster.errors import AnabranchError, EngineFailed, Internal, ResourceExhausted, Unavailable
from cluster.fault_points import reach
from cluster.telemetry import logger
from cluster.types import SequenceKey
from workers.gateway.choice import Choice, Gap, Phase, acknowledgement
from workers.gateway.dense_link import DenseLink, GatewayIdentity, LinkEvents
from workers.gateway.dense_links import DenseLinks

_log = logger("gateway.router")

_REST_FIRST_S = 0.1
_REST_MOST_S = 2.0
_FULL_REFUSALS_MAX = 6
"""A sequence already running that nobody has room for is offered this often, over some four seconds."""
_BREAKS_MAX = 16
"""A sequence during which this many dense workers die without a token between is taken for the cause."""
_FAILURES_MAX = 2
"""Likewise of those that say that their engine failed, which is no lost connection: it has a cause, and each
worker has to start again.
"""


class Router:
    """Owns which link each open sequence is on. Runs on one event loop and never waits.

    A sequence in WAITING goes to the least loaded usable link as soon as there is one; when that link
    breaks, hands it over or refuses it, it is WAITING again. It ends by its listener's deadline at the
    latest. `on_change` is told when the first link becomes usable or the last one ceases to be;
    `count_resubmission` gets the cause of each resubmission.
    """

    def __init__(
        self,
        identity: GatewayIdentity,
        config: Config,
        count_resubmission: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience_s = config.gateway.no_worker_wait_ms / 1000
        self._choices: dict[SequenceKey, Choice] = {}
        self._resting: set[SequenceKey] = set()
        self._count_resubmission = count_resubmission
        self._on_change = on_change
        events = LinkEvents(self._on_ready, self._on_step, self._on_broken)
        self._links = DenseLinks(identity, config, events)

    @property
    def usable(self) -> bool:
        """Whether a sequence submitted now would find a dense worker."""
        return self._links.choose(has_prompt=False) is not None

    def set_membership(self, membership: control_pb2.Membership) -> None:
        """Open links to new dense workers, follow the states of known ones, leave those replaced."""
        self._links.follow(membership)
        self._route(self._waiting())
        self._on_change()

    def submit(self, choices: Sequence[Choice], preferred: DenseLink | None = None) -> None:
        """Take over the choices of one new request; they share their prompt, so they go together."""
        for choice in choices:
            assert choice.key not in self._choices
            self._choices[choice.key] = choice
        if preferred is not None and preferred.usable:
            self._send(choices, preferred)
        elif not self._route(choices):
            new = [choice for choice in choices if not choice.tokens]  # what has begun waits for its deadline
            self._loop.call_later(self._patience_s, self._give_up, new)

    def end(self, choice: Choice, abort: bool) -> None:
        """Forget a choice; `abort` lets its dense worker free what it holds. Idempotent."""
        if self._choices.get(choice.key) is not choice:
            return
        del self._choices[choice.key]
        if abort and choice.link is not None:
            choice.link.send(choice.abort_message())
        choice.leave_link(Phase.FINISHED)

    async def close(self) -> None:
        """Close all links. What still runs becomes an orphan that another gateway may claim."""
        await self._links.close()

    def _waiting(self) -> list[Choice]:
        return [
            choice
            for key, choice in self._choices.items()
            if choice.phase is Phase.WAITING and key not in self._resting
        ]

    def _route(
        self, choices: Sequence[Choice], avoid: DenseLink | None = None, *, unfit_first: bool = False
    ) -> bool:
        """Send waiting choices to the least loaded link that serves them, those of one kind together; False
        if there is none. See `DenseLinks.choose`.
        """
        for has_prompt in (False, True):
            alike = [choice for choice in choices if bool(choice.tokens) is has_prompt]
            link = self._links.choose(has_prompt, avoid, unfit_first=unfit_first) if alike else None
            if link is not None:
                self._send(alike, link)
            elif alike:
                return False
        return True

    def _send(self, choices: Sequence[Choice], link: DenseLink) -> None:
        for choice in choices:
            if choice.attempts_left:
                choice.submit_to(link)
                _log.debug("submitted", request_id=choice.key.request_id, dense=link.worker_id)
            else:
                self._fail(choice, Unavailable("resubmitted too often: something is wrong with the cluster"))

    def _on_ready(self, _link: DenseLink) -> None:
        self._route(self._waiting())
        self._on_change()

    def _on_broken(self, link: DenseLink, error: AnabranchError) -> None:
        broken = [choice for choice in self._choices.values() if choice.link is link]
        for choice in broken:
            if choice.link is link:  # not ended meanwhile, with another choice of its request
                self._leave_broken(choice, link, error)
        self._on_change()

    def _leave_broken(self, choice: Choice, link: DenseLink, error: AnabranchError) -> None:
        choice.breaks_without_progress += 1
        choice.failures_without_progress += isinstance(error, EngineFailed)
        if choice.failures_without_progress >= _FAILURES_MAX:
            last = f"the last: {error.message}"
            self._fail(choice, Internal(f"{_FAILURES_MAX} dense workers failed without a token; {last}"))
        elif choice.breaks_without_progress > _BREAKS_MAX:
            self._fail(choice, Unavailable(f"{_BREAKS_MAX} dense workers were lost without a token"))
        else:
            self._resubmit(choice, "link_broken", avoid=link)

    def _on_step(self, link: DenseLink, step: dense_pb2.StepDeltas) -> None:
        for delta in step.deltas:
            choice = self._choices.get(wire.sequence_key(delta.sequence))
            if choice is not None and choice.link is link and choice.generation == delta.generation:
                self._on_delta(choice, link, delta)
            elif _is_final(delta):
                link.send(acknowledgement(delta))  # of an earlier life: nobody needs it any more

    def _on_delta(self, choice: Choice, link: DenseLink, delta: dense_pb2.SequenceDelta) -> None:
        try:
            news = choice.accept(delta)
        except Gap as gap:
            _log.error("tokens_lost", error=gap, dense=link.worker_id)
            self._resubmit(choice, "gap", avoid=link)
            return
        reach("record-send")
        choice.listener.on_news(choice, news)
        if choice.phase is Phase.FINISHED:
            return  # the listener ended it: its client was too slow
        if news.matched_stop is not None:
            self.end(choice, abort=True)
            choice.listener.on_stopped(choice, news.matched_stop)
        elif delta.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED:
            link.send(acknowledgement(delta))
            self.end(choice, abort=False)
            reach("acknowledge-finish")
            choice.listener.on_finished(choice, delta)
        elif delta.handoff:
            link.hands_over |= not delta.worker_stays
            self._resubmit(choice, "handoff", link, self._links.named(delta.handoff_to))
            self._on_change()
        elif delta.HasField("failure"):
            self._on_failure(choice, link, delta)

    def _on_failure(self, choice: Choice, link: DenseLink, delta: dense_pb2.SequenceDelta) -> None:
        failure = delta.failure
        error = rpc.from_code(failure.code, failure.reason, failure.message)
        if self._may_retry(choice, link, error):
            choice.refusals += 1
            self._rest(choice, link)
            return
        link.send(acknowledgement(delta))
        self._fail(choice, error)

    def _may_retry(self, choice: Choice, link: DenseLink, error: AnabranchError) -> bool:
        """Unavailable is retried until the deadline. Where one worker is full, a new sequence tries the
        others once each; one that has tokens already is offered a few times more.
        """
        if error.status == Unavailable.status:
            return True
        if not isinstance(error, ResourceExhausted):
            return False
        return choice.refusals < self._offers(choice, link)

    def _offers(self, choice: Choice, link: DenseLink) -> int:
        """How often a refused sequence is offered again. Only the last offer, and any beyond, goes to a
        worker that serves something else: one for prompts would keep a sequence with tokens for life.
        """
        return _FULL_REFUSALS_MAX if choice.tokens else self._links.others(link)

    def _rest(self, choice: Choice, link: DenseLink) -> None:
        """Try again after a pause, elsewhere if possible; without one where it is the first refusal."""
        unfit_first = choice.refusals >= self._offers(choice, link)
        elsewhere = self._links.choose(bool(choice.tokens), link, unfit_first=unfit_first)
        if choice.refusals == 1 and elsewhere not in (None, link):
            self._resubmit(choice, "refused", avoid=link, target=elsewhere)
            return
        choice.leave_link(Phase.WAITING)
        self._count_resubmission("refused")
        self._resting.add(choice.key)
        pause_s = min(_REST_FIRST_S * 2 ** min(choice.refusals, 10), _REST_MOST_S)
        self._loop.call_later(pause_s, self._wake, choice, link, unfit_first)

    def _wake(self, choice: Choice, avoid: DenseLink, unfit_first: bool) -> None:
        self._resting.discard(choice.key)
        if choice.phase is Phase.WAITING:
            self._route([choice], avoid, unfit_first=unfit_first)

    def _resubmit(
        self, choice: Choice, cause: str, avoid: DenseLink, target: DenseLink | None = None
    ) -> None:
        choice.leave_link(Phase.WAITING)
        self._count_resubmission(cause)
        _log.info("resubmit", request_id=choice.key.request_id, cause=cause, tokens=len(choice.tokens))
        if target is not None:
            self._send([choice], target)
        else:
            self._route([choice], avoid)

    def _give_up(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            if choice.phase is Phase.WAITING and not choice.submitted:
                self._fail(choice, Unavailable("no dense worker is ready: retry later"))

    def _fail(self, choice: Choice, error: AnabranchError) -> None:
        self.end(choice, abort=False)
        choice.listener.on_failed(choice, error)


def _is_final(delta: dense_pb2.SequenceDelta) -> bool:
    return delta.finish_reason != types_pb2.FINISH_REASON_UNSPECIFIED or delta.HasField("failure")
