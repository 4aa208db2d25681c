"""A record's line says what the record does."""

import dataclasses

import pytest

from anabranch.events import Timings
from cluster.errors import InvalidRequest
from loadgen.records import Outcome, Record, read_lines

WHOLE = Record(
    request_id="load-1-0",
    session=7,
    turn=2,
    tenant="client-3",
    stage="run",
    warm_up=False,
    outcome=Outcome.COMPLETED,
    intended_s=1.0,
    sent_s=1.25,
    first_token_s=1.5,
    last_token_s=2.5,
    ended_s=2.75,
    asked_prompt_tokens=100,
    asked_output_tokens=5,
    prompt_tokens=99,
    output_tokens=5,
    cached_tokens=64,
    finish_reason="length",
    error="",
    deltas_s=(1.5, 1.75, 2.5),
    delta_tokens=(1, 3, 1),
    timings=Timings(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1),
)
LOST = dataclasses.replace(
    WHOLE,
    outcome=Outcome.FAILED,
    sent_s=None,
    first_token_s=None,
    last_token_s=None,
    error="SENDER_LOST: it ended",
    deltas_s=(),
    delta_tokens=(),
    timings=None,
)


@pytest.mark.parametrize("record", [WHOLE, LOST], ids=["whole", "lost"])
def test_a_line_is_the_record(record: Record) -> None:
    """What was written is what is read."""
    assert Record.from_line(record.to_line()) == record


def test_deltas_are_written_as_steps() -> None:
    """Microseconds since the one before: short, and without an error that grows along the output."""
    assert '"delta_us":[1500000,250000,750000]' in WHOLE.to_line()
    crooked = dataclasses.replace(WHOLE, deltas_s=tuple(step / 3 for step in range(1, 1000)))
    read = Record.from_line(crooked.to_line())
    assert read.deltas_s == pytest.approx(crooked.deltas_s, abs=6e-7)


def test_latencies_follow_from_the_times() -> None:
    """By their definitions; from the actual send, not from the moment it was due."""
    assert WHOLE.lag_s == 0.25
    assert WHOLE.ttft_s == 0.25
    assert WHOLE.e2el_s == 1.25
    assert WHOLE.tpot_s == 0.25
    assert WHOLE.gaps_s == (0.25, 0.75)
    assert WHOLE.stay_s == 1.5
    assert (LOST.lag_s, LOST.ttft_s, LOST.tpot_s, LOST.stay_s) == (None, None, None, 0.0)
    assert dataclasses.replace(WHOLE, output_tokens=1).tpot_s is None


@pytest.mark.parametrize("line", ["", "{}", "[1]", "null", WHOLE.to_line()[:-9]])
def test_what_is_no_record_is_refused_by_line(line: str) -> None:
    """The message names the line."""
    with pytest.raises(InvalidRequest, match="line 2"):
        list(read_lines([WHOLE.to_line(), line]))
