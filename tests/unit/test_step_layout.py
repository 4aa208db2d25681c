"""Which worker attends and appends which rows of a step: every position exactly once."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sampling import SamplingParameters
from cluster.types import Epoch, Generation, KvGeometry, SequenceKey, ShardId, ShardRef, WorkerId
from workers.dense.deltas import Outbox
from workers.dense.prefixes import BlockChain
from workers.dense.sequences import LiveSequence, Placed, Stopwatch, Submission
from workers.dense.step_layout import Chunk, StepLayout, WorkerPart, lay_out, workers_of

CPU = torch.device("cpu")
CHAIN = BlockChain(KvGeometry(1, 1, 1, 8, "float32", 4, "digest"), "")


class Nobody:
    """A subscriber that is never told anything."""

    def deliver(self, step: int, deltas: object) -> None:
        """Nothing comes here."""
        raise AssertionError("a layout tells nobody")


def sequence(name: int, edges: list[int], workers: list[int]) -> LiveSequence:
    """A sequence with shards between the edges, on these workers in turn."""
    placed = tuple(
        Placed(
            ShardRef(
                WorkerId(f"w{workers[i % len(workers)]}"), Epoch(1), ShardId(100 * name + i), first, end
            ),
            Generation(7),
        )
        for i, (first, end) in enumerate(pairwise(edges))
    )
    tokens = tuple(range(edges[-1]))
    parameters = SamplingParameters(seed=0, max_tokens=1)
    submission = Submission(SequenceKey(f"s{name}"), 1, tokens, (), parameters, 0, 1, 0, 0.0, "")
    return LiveSequence(submission, Nobody(), Stopwatch(0.0), list(tokens), CHAIN, placed)


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    """A step over up to four sequences, each chunk inside one of its sequence's shards."""
    found: list[Chunk] = []
    offset = 0
    for name in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
        edges = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        live = sequence(name, edges, draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
        start = draw(st.integers(0, edges[-1] - 1))
        shard_end = next(edge for edge in edges if edge > start)
        count = draw(st.integers(1, shard_end - start))
        found.append(Chunk(live, start, count, samples=False, offset=offset))
        offset += count
    return found


def rows_of(part: WorkerPart) -> list[int]:
    """The step's row of each row that a worker is asked about."""
    assert part.queries is not None
    return torch.arange(1000)[part.queries].tolist()


def seen_positions(layout: StepLayout) -> list[list[int]]:
    """Per row of the step, the positions that workers attend for it; who sees none is not asked about."""
    seen: list[list[int]] = [[] for _ in range(layout.rows)]
    for part in layout.workers:
        if part.queries is None:
            assert all(row.visible_first == row.visible_end for row in part.plan)
            continue
        rows = iter(rows_of(part))
        for planned in part.plan:
            for _ in range(planned.count if planned.sees else 0):
                seen[next(rows)] += range(planned.visible_first, planned.visible_end)
        assert next(rows, None) is None
    return seen


@settings(max_examples=200)
@given(chunks(), st.sampled_from([(None,), (None, 3), (5,), (1, 4)]))
def test_every_visible_position_is_attended_once(step: list[Chunk], windows: tuple[int | None, ...]) -> None:
    """Over all workers a row sees each position before its chunk once, back to where the widest window of
    any layer reaches, and none beside.
    """
    layout = lay_out(step, windows, sorted(workers_of(step)), CPU)
    seen = seen_positions(layout)
    reach = None if None in windows else max(w for w in windows if w is not None)
    for chunk in step:
        first = 0 if reach is None else max(0, chunk.start - reach + 1)
        for row in chunk.rows:
            assert sorted(seen[row]) == list(range(first, chunk.start))


@settings(max_examples=200)
@given(chunks())
def test_every_chunk_is_appended_once_where_it_starts(step: list[Chunk]) -> None:
    """Exactly one shard appends a chunk, with its token ids, and it is the one that contains its start."""
    layout = lay_out(step, (None,), sorted(workers_of(step)), CPU)
    appended: list[int] = []
    for part in layout.workers:
        tails = [row for row in part.plan if row.token_ids]
        indices = [] if part.appends is None else torch.arange(1000)[part.appends].tolist()
        assert len(indices) == sum(row.count for row in tails)
        appended += indices
        for row in tails:
            (chunk,) = (c for c in step if any(p.shard.shard == row.shard for p in c.sequence.shards))
            assert row.token_ids == chunk.token_ids
            assert row.start == chunk.start
    assert sorted(appended) == list(range(layout.rows))


@settings(max_examples=200)
@given(chunks())
def test_replies_have_places_of_their_own(step: list[Chunk]) -> None:
    """No two reply rows of a step go to the same place of the merge, and each goes to its own row."""
    layout = lay_out(step, (None,), sorted(workers_of(step)), CPU)
    places = [place for part in layout.workers for place in part.places.tolist()]
    assert len(set(places)) == len(places)
    assert all(place < layout.parts_most * layout.rows for place in places)
    for part in layout.workers:
        if part.queries is not None:
            assert [place % layout.rows for place in part.places.tolist()] == rows_of(part)


def test_an_outbox_sends_one_message_per_subscriber() -> None:
    """Deltas of a step leave together, in order, and only once."""
    told: list[tuple[int, int]] = []

    class Counter:
        """Counts what it is told."""

        def deliver(self, step: int, deltas: object) -> None:
            """One message."""
            assert isinstance(deltas, list)
            told.append((step, len(deltas)))

    outbox, subscriber = Outbox(), Counter()
    live = sequence(0, [0, 4], [0])
    outbox.put(subscriber, live.delta())
    outbox.put(subscriber, live.delta(with_map=True))
    outbox.flush(3)
    outbox.flush(4)
    assert told == [(3, 2)]
