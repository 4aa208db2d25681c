"""What is known of one request: a line of JSON each, from which every figure follows.

All times are seconds since the run began, on one monotonic clock that all senders share:

    intended_s <= sent_s < first_token_s <= last_token_s <= ended_s
         |---lag---|------TTFT------|--- gaps ---|

A request that failed keeps what was seen of it: the times that never came are None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

from anabranch.events import Timings
from cluster.errors import InvalidRequest


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    """With its finish reason."""

    FAILED = "failed"
    """With an error: refused, broken, late, or lost with its sender."""

    INTERRUPTED = "interrupted"
    """Hung up by the load generator, because it was told to stop; neither a success nor a failure."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request. Times are seconds since the run began, counts are tokens."""

    request_id: str
    """As the server knows it; empty where its sender was lost."""
    session: int
    """Position in the plan, over all stages. Requests of one session are one conversation: each prompt begins
    with the one before and its answer.
    """
    turn: int
    """Position in the session, from 0; with `session` unique in a run."""
    tenant: str
    """Whose request it is: the client of a ServeGen trace; else empty."""
    stage: str
    """Part of the run that is summed up by itself: `run`, or `concurrency 8` of a ladder."""
    warm_up: bool
    """Sent before the time from which figures count."""
    outcome: Outcome
    intended_s: float
    """When it was due; in a closed loop, and after a session's first turn: when what it awaited was over."""
    sent_s: float | None
    """When it was sent; None where its sender was lost before."""
    first_token_s: float | None
    last_token_s: float | None
    ended_s: float
    """End of the stream, or the moment the failure was known."""
    asked_prompt_tokens: int
    """Tokens of the prompt as planned; the server's own count is `prompt_tokens`."""
    asked_output_tokens: int
    prompt_tokens: int
    """As the server counted; 0 where it never said."""
    output_tokens: int
    """As the server counted or, where it ended without saying, deltas received."""
    cached_tokens: int
    """Prompt tokens whose KV the server had already."""
    finish_reason: str
    """`length` or `stop`; empty unless completed."""
    error: str
    """`REASON: what happened`; empty unless failed."""
    deltas_s: tuple[float, ...]
    """Arrival of each delta that brought tokens."""
    delta_tokens: tuple[int, ...]
    """Tokens of each delta; empty where the API does not tell."""
    timings: Timings | None
    """The server's own account by role (dense, attention, lanes); None where the API has none."""

    @property
    def lag_s(self) -> float | None:
        """How late it was sent: the load generator's own error."""
        return None if self.sent_s is None else self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from the actual send."""
        return _between(self.sent_s, self.first_token_s)

    @property
    def e2el_s(self) -> float | None:
        """End-to-end latency: from the actual send to the last token."""
        return _between(self.sent_s, self.last_token_s)

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an output of fewer than two tokens."""
        whole_s = _between(self.first_token_s, self.last_token_s)
        return None if whole_s is None or self.output_tokens < 2 else whole_s / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Inter-token latencies: from each delta to the next."""
        return tuple(
            later - earlier for earlier, later in zip(self.deltas_s, self.deltas_s[1:], strict=False)
        )

    @property
    def stay_s(self) -> float:
        """Time under way, however it ended."""
        return 0.0 if self.sent_s is None else self.ended_s - self.sent_s

    def to_line(self) -> str:
        """JSON without a newline. Times are rounded to microseconds; of deltas, after the first, the
        microseconds since the one before are kept.
        """
        line: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("intended_s", "sent_s", "first_token_s", "last_token_s", "ended_s"):
            line[name] = None if line[name] is None else round(line[name], 6)
        moments_us = [round(moment * 1e6) for moment in line.pop("deltas_s")]
        line["delta_us"] = [b - a for a, b in zip([0, *moments_us], moments_us, strict=False)]
        line["timings"] = asdict(self.timings) if self.timings else None
        return json.dumps(line, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Self:
        """What `to_line` wrote. Raises InvalidRequest where it did not."""
        try:
            values = json.loads(line)
            moment_us, deltas_s = 0, []
            for step_us in values.pop("delta_us"):
                moment_us += step_us
                deltas_s.append(moment_us / 1e6)
            values["deltas_s"] = tuple(deltas_s)
            values["delta_tokens"] = tuple(values["delta_tokens"])
            values["outcome"] = Outcome(values["outcome"])
            values["timings"] = Timings(**values["timings"]) if values["timings"] else None
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(f"not a line of a load generator's records: {error}") from error


def read_lines(lines: Iterable[str]) -> Iterator[Record]:
    """The records of a file's lines. Raises InvalidRequest with the number of a line that is none."""
    for number, line in enumerate(lines, 1):
        try:
            yield Record.from_line(line)
        except InvalidRequest as error:
            raise InvalidRequest(f"line {number}: {error.message}") from error


def _between(earlier_s: float | None, later_s: float | None) -> float | None:
    return None if earlier_s is None or later_s is None else later_s - earlier_s
