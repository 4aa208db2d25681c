"""One sender's part of a stage: each request sent at its moment and heard to its end, one record for each.

    session --due - LEAD_S--> prompt and request built --due--> sent ... heard --record--> think, next turn

Moments are absolute on a monotonic clock: a request that is late delays none of the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.clock import Clock
from cluster.errors import AnabranchError
from loadgen.drivers.interface import Ask, Driver, Hearing
from loadgen.plan import Stage
from loadgen.prompts import Prompt, Source, joined
from loadgen.records import Outcome, Record
from loadgen.workload import Session

LEAD_S = 0.25
"""How long before it is due a request is built."""


@dataclass(slots=True)
class Counts:
    """What a sender has done so far, for whoever looks at the run while it goes on."""

    sent: int = 0
    under_way: int = 0


@dataclass(frozen=True, slots=True)
class Tools:
    """What a sender works with. `run_id` begins the ids of all requests; `now_s` is the run's clock, in
    seconds since it began, the same in all senders; `keep` is given each record as its request ends.
    """

    driver: Driver
    source: Source
    run_id: str
    now_s: Clock
    keep: Callable[[Record], None]
    counts: Counts


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that is ready to be sent."""

    session: Session
    turn: int
    ask: Ask
    prompt_tokens: int
    due_s: float


class StageRun:
    """A stage that begins at `begins_s`, done once."""

    def __init__(self, tools: Tools, stage: Stage, begins_s: float) -> None:
        self._tools = tools
        self._stage = stage
        self._begins_s = begins_s

    async def run(self) -> None:
        """Do it to the end. Cancelled, it hangs up: what was under way has been interrupted."""
        await self._until(self._begins_s)
        async with asyncio.TaskGroup() as tasks:
            if self._stage.concurrency is not None:
                waiting = deque(self._stage.sessions)
                for _ in range(self._stage.concurrency):
                    tasks.create_task(self._be_user(waiting))
                return
            for session in self._stage.sessions:
                assert session.at_s is not None, "an open loop's sessions have moments"
                due_s = self._begins_s + session.at_s
                await self._until(due_s - LEAD_S)
                tasks.create_task(self._converse(session, due_s))

    async def _be_user(self, waiting: deque[Session]) -> None:
        while waiting and not self._is_over():
            await self._converse(waiting.popleft(), self._tools.now_s())

    async def _converse(self, session: Session, due_s: float) -> None:
        """One turn after the other; a failed one is the last, since the next has nothing to go on from."""
        before: Prompt | None = None
        prompt_tokens = 0
        for number, turn in enumerate(session.turns):
            if number and self._is_over():
                return
            due_s += turn.think_s
            prompt_tokens += turn.new_tokens
            written = self._tools.source.write(turn.segments)
            prompt = written if before is None else joined(before, written)
            ask = Ask(f"{self._tools.run_id}-{session.index}-{number}", prompt, turn.output_tokens)
            record, hearing = await self._request(_Asked(session, number, ask, prompt_tokens, due_s))
            if record.outcome is not Outcome.COMPLETED:
                return
            before = joined(prompt, hearing.answer(prompt))
            prompt_tokens += record.output_tokens
            due_s = record.ended_s

    async def _request(self, asked: _Asked) -> tuple[Record, Hearing]:
        """Send when due, hear to the end, keep the record."""
        send = self._tools.driver.prepare(asked.ask)
        await self._until(asked.due_s)
        hearing, counts = Hearing(self._tools.now_s), self._tools.counts
        outcome, error = Outcome.INTERRUPTED, ""
        counts.sent += 1
        counts.under_way += 1
        try:
            await send(hearing)
            outcome = Outcome.COMPLETED
        except AnabranchError as failure:
            outcome, error = Outcome.FAILED, f"{failure.reason}: {failure.message}"
        finally:  # cancelled too
            counts.under_way -= 1
            record = self._record(asked, hearing, outcome, error)
            self._tools.keep(record)
        return record, hearing

    def _record(self, asked: _Asked, hearing: Hearing, outcome: Outcome, error: str) -> Record:
        return Record(
            request_id=asked.ask.request_id,
            session=asked.session.index,
            turn=asked.turn,
            tenant=asked.session.tenant,
            stage=self._stage.name,
            warm_up=asked.due_s < self._begins_s + self._stage.warm_up_s,
            outcome=outcome,
            intended_s=asked.due_s,
            sent_s=hearing.sent_s,
            first_token_s=hearing.deltas_s[0] if hearing.deltas_s else None,
            last_token_s=hearing.deltas_s[-1] if hearing.deltas_s else None,
            ended_s=self._tools.now_s(),
            asked_prompt_tokens=asked.prompt_tokens,
            asked_output_tokens=asked.ask.output_tokens,
            prompt_tokens=hearing.prompt_tokens,
            output_tokens=hearing.output_tokens,
            cached_tokens=hearing.cached_tokens,
            finish_reason=hearing.finish_reason if outcome is Outcome.COMPLETED else "",
            error=error,
            deltas_s=tuple(hearing.deltas_s),
            delta_tokens=tuple(hearing.delta_tokens),
            timings=hearing.timings,
        )

    def _is_over(self) -> bool:
        """Whether a closed loop begins nothing new."""
        if self._stage.concurrency is None or self._stage.duration_s is None:
            return False
        return self._tools.now_s() >= self._begins_s + self._stage.duration_s

    async def _until(self, moment_s: float) -> None:
        if (left_s := moment_s - self._tools.now_s()) > 0:
            await asyncio.sleep(left_s)
