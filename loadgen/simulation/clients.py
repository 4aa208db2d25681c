"""The load of one stage on a virtual clock: sessions go as `loadgen.sender` lets them, with its records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from anabranch.events import Timings
from cluster.errors import AnabranchError
from cluster.types import SequenceKey
from loadgen.plan import Stage
from loadgen.records import Outcome, Record
from loadgen.simulation.engine import SimulatedEngine, SimulatedSequence
from loadgen.simulation.prefixes import Contents
from loadgen.simulation.timeline import Timeline
from loadgen.workload import Session


@dataclass(slots=True)
class _Asked:
    """A request under way, and what its session did before."""

    session: Session
    turn: int
    due_s: float
    prompt_tokens: int
    sequence: SimulatedSequence


@dataclass(slots=True)
class StageClients:
    """Everybody who asks in a stage that begins at `begins_s`. A request goes to the dense worker with the
    fewest sequences, as a gateway's does.
    """

    stage: Stage
    begins_s: float
    timeline: Timeline
    engines: tuple[SimulatedEngine, ...]
    call_s: float
    timeout_s: float
    keep: Callable[[Record], None]
    contents: Contents | None
    """None where nothing is shared."""
    sent: int = 0
    sessions_left: int = 0
    """Those that are not over yet."""
    under_way: dict[SequenceKey, _Asked] = field(default_factory=dict)
    waiting: deque[Session] = field(default_factory=deque)

    def begin(self) -> None:
        """Schedule every session; of a closed loop, one for each user."""
        self.sessions_left = len(self.stage.sessions)
        if self.stage.concurrency is None:
            for session in self.stage.sessions:
                assert session.at_s is not None, "an open loop's sessions have moments"
                self._begin_turn(session, 0, self.begins_s + session.at_s, 0)
            return
        self.waiting = deque(self.stage.sessions)
        for _ in range(self.stage.concurrency):
            self._next_session(self.begins_s)

    def interrupt(self) -> None:
        """Hang up: what is under way has a record that says so."""
        for asked in list(self.under_way.values()):
            self._keep(asked, Outcome.INTERRUPTED, "", self.timeline.now_s)

    def _next_session(self, due_s: float) -> None:
        if self._is_over(due_s):
            self.sessions_left -= len(self.waiting)
            self.waiting.clear()
        elif self.waiting:
            self._begin_turn(self.waiting.popleft(), 0, due_s, 0)

    def _begin_turn(self, session: Session, turn: int, due_s: float, tokens_before: int) -> None:
        due_s += session.turns[turn].think_s
        self.timeline.at(due_s, partial(self._send, session, turn, due_s, tokens_before))

    def _send(self, session: Session, turn: int, due_s: float, tokens_before: int) -> None:
        sequence = SimulatedSequence(
            key=SequenceKey(f"simulated-{session.index}-{turn}"),
            prompt_tokens=tokens_before + session.turns[turn].new_tokens,
            output_tokens=session.turns[turn].output_tokens,
            deadline_s=due_s + self.timeout_s,
            submitted_s=due_s + self.call_s,
            ended=self._ended,
        )
        if self.contents is not None:
            sequence.chain = self.contents.chain(session, turn)
        self.sent += 1
        self.under_way[sequence.key] = _Asked(session, turn, due_s, sequence.prompt_tokens, sequence)
        self.timeline.at(sequence.submitted_s, partial(self._submit, sequence))

    def _submit(self, sequence: SimulatedSequence) -> None:
        min(self.engines, key=lambda engine: engine.load).submit(sequence)

    def _ended(self, sequence: SimulatedSequence, error: AnabranchError | None) -> None:
        asked = self.under_way[sequence.key]
        ended_s = self.timeline.now_s + self.call_s
        outcome = Outcome.COMPLETED if error is None else Outcome.FAILED
        self._keep(asked, outcome, f"{error.reason}: {error.message}" if error else "", ended_s)
        turn = asked.turn + 1
        if error is None and turn < len(asked.session.turns) and not self._is_over(ended_s):
            self._begin_turn(asked.session, turn, ended_s, asked.prompt_tokens + sequence.output_tokens)
            return
        self.sessions_left -= 1
        if self.stage.concurrency is not None:
            self._next_session(ended_s)

    def _is_over(self, now_s: float) -> bool:
        """Whether a closed loop begins nothing new."""
        if self.stage.concurrency is None or self.stage.duration_s is None:
            return False
        return now_s >= self.begins_s + self.stage.duration_s

    def _keep(self, asked: _Asked, outcome: Outcome, error: str, ended_s: float) -> None:
        sequence = asked.sequence
        del self.under_way[sequence.key]
        tokens_s = sequence.tokens_s
        record = Record(
            request_id=sequence.key.request_id,
            session=asked.session.index,
            turn=asked.turn,
            tenant=asked.session.tenant,
            stage=self.stage.name,
            warm_up=asked.due_s < self.begins_s + self.stage.warm_up_s,
            outcome=outcome,
            intended_s=asked.due_s,
            sent_s=asked.due_s,
            first_token_s=tokens_s[0] if tokens_s else None,
            last_token_s=tokens_s[-1] if tokens_s else None,
            ended_s=ended_s,
            asked_prompt_tokens=asked.prompt_tokens,
            asked_output_tokens=sequence.output_tokens,
            prompt_tokens=asked.prompt_tokens,
            output_tokens=len(tokens_s),
            cached_tokens=sequence.cached_tokens,
            finish_reason="length" if outcome is Outcome.COMPLETED else "",
            error=error,
            deltas_s=tuple(tokens_s),
            delta_tokens=(1,) * len(tokens_s),
            timings=_timings(sequence, self.call_s) if outcome is Outcome.COMPLETED else None,
        )
        self.keep(record)


def _timings(sequence: SimulatedSequence, call_s: float) -> Timings:
    """What a dense worker would tell of a sequence that has all its tokens."""
    assert sequence.admitted_s is not None
    first_s, last_s = sequence.tokens_s[0] - call_s, sequence.tokens_s[-1] - call_s
    return Timings(
        queue_seconds=sequence.admitted_s - sequence.submitted_s,
        prefill_seconds=first_s - sequence.admitted_s,
        decode_seconds=last_s - first_s,
        dense_seconds=sequence.dense_s,
        attention_seconds=sequence.attention_s,
        lane_seconds=sequence.lane_s,
        waited_seconds=sequence.waited_s,
        preemptions=sequence.preemptions,
    )
