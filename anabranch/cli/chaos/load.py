"""The load: every request of a schedule through the public client, with the time of each token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic

from anabranch import AsyncClient
from anabranch.cli.chaos.schedule import Request
from anabranch.events import Finished, TokenDelta
from cluster.errors import AnabranchError

_DEADLINE_S = 60.0
"""Of each request; far beyond what recovery takes, so one that meets it hung."""

_HASTY_DEADLINE_S = 10.0
_HASTY_OUTAGE_S = 3.0
"""A hasty client gives up after this time, and when for so long no gateway serves."""


_SILENCE_S = 0.8
"""As a client would ask for whose gateways are near: what a frozen or cut-off one costs its streams."""


_LATE_S = 2.0


def deadline_s(request: Request) -> float:
    """Seconds in which a request must end, one way or the other."""
    return _HASTY_DEADLINE_S if request.is_hasty else _DEADLINE_S


@dataclass(frozen=True, slots=True)
class Silence:
    """Of one stream, between two tokens or before the first; monotonic seconds. `is_reopened`: the stream was
    opened anew in it.
    """

    began_s: float
    ended_s: float
    is_reopened: bool

    @property
    def seconds(self) -> float:
        """How long it was."""
        return self.ended_s - self.began_s


@dataclass(slots=True)
class Answer:
    """What became of one request. Times are monotonic seconds; `resumes` how often its stream was opened anew
    before each arrival.
    """

    request: Request
    sent_s: float = 0.0
    ended_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)
    error: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it ended well, with all its tokens."""
        return not self.error and len(self.tokens) == self.request.max_tokens

    @property
    def status(self) -> str:
        """The gRPC status it failed with, empty where it did not."""
        return self.error.partition(":")[0]

    @property
    def is_late(self) -> bool:
        """Whether it went on beyond its deadline, and some time for a machine that is busy."""
        return self.ended_s - self.sent_s > deadline_s(self.request) + _LATE_S

    def waits_since(self, moment_s: float) -> bool:
        """Whether it was under way at a moment, and nothing came of it since: no token, and no end."""
        was_open = 0.0 < self.sent_s <= moment_s and not self.ended_s
        return was_open and (not self.arrivals_s or self.arrivals_s[-1] <= moment_s)

    def longest_gap_s(self) -> float:
        """The longest silence, the one before the first token included."""
        times = [self.sent_s, *self.arrivals_s]
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def heard_before(self, moment_s: float) -> float:
        """When its last token before a moment arrived; when it was sent where none did."""
        return max((arrival_s for arrival_s in self.arrivals_s if arrival_s <= moment_s), default=self.sent_s)

    def silences(self, from_s: float, until_s: float) -> list[Silence]:
        """Those around a moment and up to another: none where it was not open at the first, or no token came
        after it.
        """
        if from_s < self.sent_s:
            return []
        found = []
        before_s, resumes = self.sent_s, 0
        for arrival_s, resumed in zip(self.arrivals_s, self.resumes, strict=True):
            if arrival_s > from_s and before_s <= until_s:
                found.append(Silence(before_s, arrival_s, resumed > resumes))
            before_s, resumes = arrival_s, resumed
        return found


class Load:
    """One run of a schedule. `open` counts the requests under way."""

    def __init__(self, schedule: Sequence[Request], gateways: Sequence[str], suffix: str) -> None:
        """`suffix` tells the request ids of this run from another's."""
        self.answers = [Answer(request) for request in schedule]
        self._client = AsyncClient(gateways, silence_s=_SILENCE_S)
        self._hasty = AsyncClient(gateways, silence_s=_SILENCE_S, outage_s=_HASTY_OUTAGE_S)
        self._suffix = suffix
        self._news = asyncio.Event()
        self.open = 0
        self.ended = 0

    async def run(self) -> list[Answer]:
        """Send every request when it is due, and read all to their ends; never raises for a request."""
        began_s = monotonic()
        async with self._client, self._hasty, asyncio.TaskGroup() as tasks:
            for answer in self.answers:
                await asyncio.sleep(max(0.0, began_s + answer.request.at_s - monotonic()))
                tasks.create_task(self._read(answer))
        return self.answers

    async def goes_on(self, moment_s: float) -> None:
        """Until each request that was under way at a moment has had a token since, or ended."""
        while any(answer.waits_since(moment_s) for answer in self.answers):
            self._news.clear()
            await self._news.wait()

    def tokens_per_second(self) -> float:
        """Over the whole run, from the first request to the last token."""
        seconds = max(a.ended_s for a in self.answers) - min(a.sent_s for a in self.answers)
        return sum(len(answer.tokens) for answer in self.answers) / seconds

    async def _read(self, answer: Answer) -> None:
        request = answer.request
        answer.sent_s = monotonic()
        self.open += 1
        try:
            stream = (self._hasty if request.is_hasty else self._client).generate(
                token_ids=request.prompt,
                request_id=f"{request.name}{self._suffix}",
                deadline_s=deadline_s(request),
                max_tokens=request.max_tokens,
                ignore_eos=True,
                **request.sampling,
            )
            finished = False
            async for event in stream:
                if isinstance(event, TokenDelta) and event.token_ids:
                    answer.tokens += event.token_ids
                    answer.arrivals_s.append(monotonic())
                    answer.resumes.append(stream.resumes)
                    self._news.set()
                finished |= isinstance(event, Finished)
            if not finished:
                answer.error = "INTERNAL: the stream ended without an end"
        except AnabranchError as error:
            answer.error = f"{error.status}: {error.message}"
        finally:
            answer.ended_s = monotonic()
            self.open -= 1
            self.ended += 1
            self._news.set()
