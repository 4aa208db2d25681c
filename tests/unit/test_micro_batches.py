"""Who is in which micro-batch: every chunk once, sequences stay, and two only where they pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.perfmodel import Line, MicroBatch, SideTimes, staggering_gain
from cluster.policies.micro_batches import MicroBatches, TimesSeen, work_of
from tests.unit.test_step_layout import sequence
from workers.dense.sequences import LiveSequence
from workers.dense.step_layout import Chunk, offset_anew


def chunks_of(sequences: Sequence[LiveSequence], starts: Sequence[int]) -> list[Chunk]:
    """A decoding step: one row of each sequence at its position."""
    return [
        Chunk(live, start, 1, samples=True, offset=offset)
        for offset, (live, start) in enumerate(zip(sequences, starts, strict=True))
    ]


def sequences(count: int) -> list[LiveSequence]:
    """As many sequences."""
    return [sequence(name, [0, 10_000], [0]) for name in range(count)]


def names(half: Sequence[Chunk]) -> set[str]:
    """Whose chunks these are."""
    return {chunk.sequence.key.request_id for chunk in half}


@given(st.lists(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 5000)), max_size=8), min_size=1))
def test_every_chunk_is_in_one_micro_batch(steps: list[list[tuple[int, int]]]) -> None:
    """Whoever comes and goes: the halves hold each chunk once, in the plan's order, with own rows."""
    live, batches = sequences(12), MicroBatches(2)
    for step in steps:
        places = dict(step)
        if not places:
            continue
        chunks = chunks_of([live[name] for name in places], list(places.values()))
        halves = batches.split(chunks, remote=True)
        assert len(halves) == min(2, len(chunks))
        for half in halves:
            assert [chunk.offset for chunk in offset_anew(half)] == list(range(len(half)))
            order = [chunks.index(_original(chunks, chunk)) for chunk in half]
            assert order == sorted(order)
        assert sum(map(len, halves)) == len(chunks)
        assert set.union(*map(names, halves)) == names(chunks)


def _original(chunks: Sequence[Chunk], half: Chunk) -> Chunk:
    return next(chunk for chunk in chunks if chunk.sequence is half.sequence)


def test_a_sequence_stays_where_it_is() -> None:
    """Over decoding steps, and while others come and go without making one side much heavier."""
    live, batches = sequences(9), MicroBatches(2)
    first, second = batches.split(chunks_of(live[:8], [1000] * 8), remote=True)
    assert len(first) == len(second) == 4
    for step in range(50):
        again = batches.split(chunks_of(live[:8], [1000 + step] * 8), remote=True)
        assert [names(half) for half in again] == [names(first), names(second)]
    grown = batches.split(chunks_of(live, [1050] * 9), remote=True)
    assert names(first) <= names(grown[0])
    assert names(second) <= names(grown[1])


def test_one_side_that_grew_much_heavier_gives_up_sequences() -> None:
    """When one side's sequences have ended, others change over, one a step, until both have work alike."""
    live, batches = sequences(8), MicroBatches(2)
    first, _ = batches.split(chunks_of(live, [1000] * 8), remote=True)
    left = [chunk.sequence for chunk in first]
    sizes = []
    for _ in range(4):
        halves = batches.split(chunks_of(left, [1000] * 4), remote=True)
        sizes.append(sorted(map(len, halves)))
    assert sizes == [[1, 3], [2, 2], [2, 2], [2, 2]]


@pytest.mark.parametrize("setting", [1, 2, "auto"])
def test_one_chunk_or_local_attention_stays_whole(setting: Literal[1, 2, "auto"]) -> None:
    """There is nothing to stagger in a batch of one, and nothing to hide in monolithic mode."""
    batches = MicroBatches(setting)
    assert len(batches.split(chunks_of(sequences(1), [5000]), remote=True)) == 1
    assert len(batches.split(chunks_of(sequences(8), [5000] * 8), remote=False)) == 1


@pytest.mark.parametrize(
    ("attention_s", "halves"), [(0.060, 2), (0.004, 1)], ids=["attention like dense", "hardly any attention"]
)
def test_auto_splits_where_it_pays(attention_s: float, halves: int) -> None:
    """From what steps took: where attention takes as long as dense work the step is split, where it takes
    next to nothing the weights are read only once.
    """
    batches, live = MicroBatches("auto"), sequences(8)
    for count in (8, 4):
        chunks = chunks_of(live[:count], [4000] * count)
        work = work_of(chunks)
        batches.split(chunks, remote=True)
        batches.note(work, 0.040 + 0.002 * count, attention_s * count / 8, 0.004)
    assert len(batches.split(chunks_of(live, [4000] * 8), remote=True)) == halves


def test_auto_begins_whole_and_looks_again() -> None:
    """Before anything was measured a step is whole; the choice follows what is measured later, within 32
    steps where the batch has long been the same.
    """
    batches, chunks = MicroBatches("auto"), chunks_of(sequences(8), [4000] * 8)
    assert len(batches.split(chunks, remote=True)) == 1
    batches.note(work_of(chunks), 0.050, 0.060, 0.004)
    assert {len(batches.split(chunks, remote=True)) for _ in range(64)} == {2}
    for _ in range(200):  # attention became so fast that there is nothing to hide
        batches.note(work_of(chunks), 0.050, 0.001, 0.0001)
    seen = [len(batches.split(chunks, remote=True)) for _ in range(33)]
    assert (seen[0], seen[-1]) == (2, 1)


def test_a_step_of_other_rows_is_judged_anew() -> None:
    """What pays beside chunks of two prompts does not in the decoding step behind, of as many sequences."""
    batches, live = MicroBatches("auto"), sequences(8)
    decoding = chunks_of(live, [500] * 8)
    prompts = [Chunk(one, 2000, 500, samples=True, offset=0) for one in live[:2]]
    beside = offset_anew([*prompts, *decoding[2:]])
    for step, dense_s, attention_s in ((decoding, 0.0195, 0.0005), (beside, 0.080, 0.080)):
        batches.note(work_of(step), dense_s, attention_s, 0.002)
    assert len(batches.split(beside, remote=True)) == 2
    assert len(batches.split(decoding, remote=True)) == 1


def test_a_guess_is_judged_anew_once_it_was_run() -> None:
    """From prompts alone decoding seems to cost by the row, so that two would hide lanes. As soon as it was
    seen that each half reads the weights, the steps of the same batch are whole.
    """
    batches, decoding = MicroBatches("auto"), chunks_of(sequences(8), [500] * 8)
    for rows in (600, 1500):
        batches.note(MicroBatch(rows, 0), 70e-6 * rows, 0.0, 0.003 + 3e-6 * rows)
    halves = batches.split(decoding, remote=True)
    assert len(halves) == 2
    for half in halves:
        batches.note(work_of(half), 0.0205, 0.00005, 0.003)
    assert len(batches.split(decoding, remote=True)) == 1


def test_few_rows_that_take_longer_than_more_are_remembered() -> None:
    """Where a product of four rows takes longer than one of eight, a line through all sizes would go on to
    split eight into four and four: what such halves took when they were run counts.
    """
    batches, decoding = MicroBatches("auto"), chunks_of(sequences(8), [500] * 8)
    took_s = {1: 0.0075, 8: 0.0108, 4: 0.0129, 256: 0.190}
    for _ in range(8):
        for rows in (1, 256):
            batches.note(MicroBatch(rows, 500 * rows), took_s[rows], 1.4e-6 * 500 * rows, 0.0035)
    seen = []
    for _ in range(100):
        halves = batches.split(decoding, remote=True)
        seen.append(len(halves))
        for half in halves:
            batches.note(work_of(half), took_s[len(half)], 1.4e-6 * 500 * len(half), 0.0035)
    assert seen[0] == 2
    assert seen[-50:] == [1] * 50


def test_halves_not_seen_yet_are_judged_by_what_is_near() -> None:
    """Prompts tell a line that says nothing of decoding: what eight rows took often enough tells what four
    will, so that the steps of a batch that has long been whole stay so.
    """
    batches, decoding = MicroBatches("auto"), chunks_of(sequences(8), [500] * 8)
    for _ in range(8):
        for rows in (600, 1500):
            batches.note(MicroBatch(rows, 0), 70e-6 * rows, 0.0, 0.003)
        batches.note(work_of(decoding), 0.0205, 0.010, 0.003)
    assert {len(batches.split(decoding, remote=True)) for _ in range(64)} == {1}


def test_times_of_other_sizes_are_kept() -> None:
    """A thousand steps of one size do not wash out what another took."""
    times = TimesSeen(is_fixed=True)
    assert times.line() is None
    times.note(4, 0.048)
    for _ in range(1000):
        times.note(8, 0.056)
    line = times.line()
    assert line is not None
    assert line.at(6) == pytest.approx(0.052)


def test_a_line_is_never_negative() -> None:
    """Noise that would give a negative base or slope gives a line through zero, or a level one."""
    falling = Line.through([(1, 2.0), (2, 1.0)], is_fixed=True)
    assert falling.each_s == 0
    assert falling.base_s == pytest.approx(1.5)
    steep = Line.through([(1, 0.1), (2, 2.0)], is_fixed=True)
    assert steep.base_s == 0
    assert Line.through([(4, 2.0)], is_fixed=True).at(2) == 2.0
    assert Line.through([(4, 2.0)], is_fixed=False).at(2) == 1.0


@given(st.floats(0.001, 1), st.floats(0, 0.1), st.floats(1e-9, 1e-3), st.floats(0, 0.1), st.integers(1, 64))
def test_the_gain_is_at_most_two(base: float, row: float, score: float, lane: float, rows: int) -> None:
    """Two halves never take less than half of the whole, whatever both sides cost."""
    times = SideTimes(Line(base, row).at, Line(0.0, score).at, lane)
    half = MicroBatch(rows, rows * 1000)
    assert 0 < staggering_gain(times, half, half) <= 2 + 1e-9
