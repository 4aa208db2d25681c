"""Lengths, scaling, clipping, sessions and what prompts say."""

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.errors import InvalidRequest
from loadgen import lengths
from loadgen.lengths import Histogram
from loadgen.prompts import Prompt, PromptKind, TokenSource, source
from loadgen.workload import Origin, Row, Segment, clipped, counted, drawn, repeated, scaled, sessions

MANY = 40_000
SHARING = [
    Row(1400, 10, blocks=(0, 1, 2), block_tokens=512),
    Row(1536, 10, blocks=(0, 1, 3), block_tokens=512),
]


def _draw(text: str, seed: int = 0) -> np.ndarray:
    return lengths.parse(text).draw(np.random.default_rng(seed), MANY)


def test_lengths_are_those_of_their_distribution() -> None:
    """Means and variations of many draws, and the bounds of each kind."""
    assert set(_draw("128").tolist()) == {128}
    uniform = _draw("uniform:64:256")
    assert (uniform.min(), uniform.max()) == (64, 256)
    assert uniform.mean() == pytest.approx(160, rel=0.01)
    lognormal = _draw("lognormal:500:0.8")
    assert lognormal.mean() == pytest.approx(500, rel=0.03)
    assert lognormal.std() / lognormal.mean() == pytest.approx(0.8, rel=0.06)
    assert _draw("lognormal:1:2").min() == 1
    histogram = Histogram((5, 9), (0.25, 0.75)).draw(np.random.default_rng(0), MANY)
    assert histogram.mean() == pytest.approx(8, rel=0.01)


@pytest.mark.parametrize("text", ["", "many", "0", "uniform:3", "uniform:9:3", "lognormal:0:1", "normal:1:2"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    """Whatever cannot be drawn from is an error of the caller's."""
    with pytest.raises(InvalidRequest):
        lengths.parse(text)


def test_the_same_seed_gives_the_same_rows() -> None:
    """Prompts do not change with how outputs are drawn: each purpose has a generator of its own."""
    prompts, outputs = lengths.parse("uniform:1:99"), lengths.parse("uniform:1:9")
    first = drawn(prompts, outputs, seed=5, count=50)
    assert first == drawn(prompts, outputs, seed=5, count=50)
    assert first != drawn(prompts, outputs, seed=6, count=50)
    fixed = drawn(prompts, lengths.parse("3"), seed=5, count=50)
    assert [row.prompt_tokens for row in fixed] == [row.prompt_tokens for row in first]


def test_clipping_fits_the_context_and_says_so() -> None:
    """An output becomes half of the context at most, a prompt what is left; a line tells counts and means."""
    rows = [Row(100, 50), Row(5000, 100), Row(10, 900)]
    fitting, words = clipped(rows, 1000)
    assert [(row.prompt_tokens, row.output_tokens) for row in fitting] == [(100, 50), (900, 100), (10, 500)]
    assert "2 of 3 requests" in words
    assert "mean prompt 1,703.3 -> 336.7" in words
    assert "mean output 350.0 -> 216.7" in words
    assert clipped(rows[:1], 1000) == (rows[:1], "")


def test_repeating_says_so() -> None:
    """A workload of too few requests begins again, aloud; one without any is refused."""
    rows = [Row(1, 1), Row(2, 2)]
    assert repeated(rows, 3) == ([*rows, rows[0]], "its 2 requests are repeated to make 3")
    assert repeated(rows, 1) == (rows[:1], "")
    with pytest.raises(InvalidRequest):
        repeated([], 1)


def _prompts(rows: Sequence[Row], kind: PromptKind) -> list[Prompt]:
    plan, _ = sessions(rows, None, turns=1, think_s=0.0, context=10_000, seed=1)
    writer = source(kind, 1, 49_152)
    return [writer.write(session.turns[0].segments) for session in plan]


@pytest.mark.parametrize("kind", PromptKind)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_blocks_of_one_name_are_a_shared_prefix(kind: PromptKind, factor: float) -> None:
    """Prompts agree over exactly the blocks they have in common, scaled or not, and differ from there on."""
    written = _prompts(scaled(SHARING, factor), kind)
    first, second = (prompt.split() if isinstance(prompt, str) else prompt for prompt in written)
    common = round(1024 * factor)
    assert (len(first), len(second)) == (round(1400 * factor), round(1536 * factor))
    assert first[:common] == second[:common]
    assert first[common : common + 100] != second[common : common + 100]


def test_a_clipped_prompt_is_the_beginning_of_the_whole_one() -> None:
    """Clipping takes from the end, in the middle of a block too: what was shared is shared still."""
    short, _ = clipped(SHARING, 800)
    for whole, cut in zip(
        _prompts(SHARING, PromptKind.TOKENS), _prompts(short, PromptKind.TOKENS), strict=True
    ):
        assert whole[: len(cut)] == cut


def test_own_prompts_share_nothing() -> None:
    """Requests without blocks have contents of their own, the same again with the same seed."""
    rows = [Row(50, 1), Row(50, 1)]
    first, second = _prompts(rows, PromptKind.TOKENS)
    assert first != second
    assert _prompts(rows, PromptKind.TOKENS) == [first, second]


def test_tokens_need_a_vocabulary_and_lie_within_it() -> None:
    """Ids are drawn away from both ends; without a vocabulary the refusal says what to give."""
    written = TokenSource(0, 64).write([Segment(Origin.OWN, 3, 500)])
    assert min(written) >= 8
    assert max(written) < 56
    with pytest.raises(InvalidRequest, match="--vocabulary"):
        source(PromptKind.TOKENS, 0, None)


def test_sessions_are_consecutive_rows_within_the_context() -> None:
    """Turns that a conversation's context cannot hold are left out, and counted aloud."""
    rows = [Row(100, 100)] * 6
    plan, words = sessions(rows, np.array([1.0, 2.0]), turns=3, think_s=0.5, context=400, seed=1)
    assert [(session.at_s, len(session.turns)) for session in plan] == [(1.0, 2), (2.0, 2)]
    assert counted(plan) == 4
    assert words.startswith("2 turns left out")
    assert plan[0].turns[0].think_s == 0  # it begins when it is due
    assert plan[0].turns[1].think_s > 0


def test_think_times_have_the_mean_asked_for() -> None:
    """Exponential, before every request of a closed loop."""
    plan, _ = sessions([Row(1, 1)] * 5000, None, turns=1, think_s=2.0, context=10, seed=3)
    pauses = np.array([session.turns[0].think_s for session in plan])
    assert pauses.mean() == pytest.approx(2.0, rel=0.06)
    assert pauses.std() / pauses.mean() == pytest.approx(1.0, rel=0.06)


def test_blocks_are_not_cut_into_turns() -> None:
    """A trace whose prompts carry their conversations is refused as material for sessions."""
    with pytest.raises(InvalidRequest, match="--turns"):
        sessions(SHARING, None, turns=2, think_s=0.0, context=10_000, seed=1)
