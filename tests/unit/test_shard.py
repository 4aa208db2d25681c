"""A shard's own rules: what makes an append certain, what it refuses, what a take-over leaves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Fenced
from cluster.types import ShardId
from tests.attention_builders import key
from workers.attention.shard import LayerArrival, Shard

LAYERS = 3
CASES = settings(max_examples=100, deadline=None)


def shard(first: int = 10, end: int = 30, committed: tuple[int, ...] = ()) -> Shard:
    """Room for positions 10..30 in blocks of four, scattered."""
    blocks = [9, 2, 3, 7, 0][: -(-(end - first) // 4)]
    return Shard(ShardId(5), key(), first, end, block_tokens=4, blocks=blocks, token_ids=list(committed))


def arrival(layers: int = LAYERS) -> LayerArrival:
    """A step of which `layers` layers have arrived."""
    step = LayerArrival(LAYERS)
    for layer in range(layers):
        step.mark(layer)
    return step


def test_layers_come_in_order_each_once() -> None:
    """A layer that is repeated, skipped, negative or beyond the last is refused and counts for nothing."""
    step = arrival(1)
    for wrong in (-1, 0, 2, LAYERS):
        with pytest.raises(Fenced, match=f"layer {wrong} arrived where layer 1 was due"):
            step.mark(wrong)
    step.mark(1)
    assert not step.is_complete
    step.mark(2)
    assert step.is_complete
    for beyond in (2, LAYERS):
        with pytest.raises(Fenced, match="after all 3 layers"):
            step.mark(beyond)
    assert step.is_complete


def test_a_chunk_is_certain_when_the_next_step_names_what_follows() -> None:
    """Complete layers alone commit nothing; the start of the next row does."""
    held = shard()
    held.append(10, (1, 2, 3), arrival())
    assert (held.committed, held.written) == (10, 13)
    held.commit(10)
    assert held.committed == 10
    held.commit(13)
    assert (held.committed, held.written, held.token_ids) == (13, 13, [1, 2, 3])


@pytest.mark.parametrize("layers", range(LAYERS))
def test_commit_needs_all_layers(layers: int) -> None:
    """Naming what follows a chunk that misses layers is refused, and the chunk stays uncertain."""
    held = shard()
    held.append(10, (1, 2), arrival(layers))
    with pytest.raises(Fenced, match=r"positions 10\.\.12 miss layers") as caught:
        held.commit(12)
    assert caught.value.metadata == {"shards": "5"}
    assert held.committed == 10


@CASES
@given(count=st.integers(1, 8), start=st.integers(0, 40))
def test_a_row_commits_what_lies_before_it(count: int, start: int) -> None:
    """Of a complete chunk, a row at `start` commits the positions below it, and no more than were written."""
    held = shard()
    held.append(10, tuple(range(count)), arrival())
    held.commit(start)
    kept = min(max(start - 10, 0), count)
    assert held.token_ids == list(range(kept))
    assert (held.pending is None) == (kept > 0)


def test_a_write_at_the_committed_length_overwrites() -> None:
    """A repeated chunk, of any length, takes the place of the one that was never committed."""
    held = shard(committed=(1, 2))
    held.append(12, (7, 8, 9), arrival())
    held.append(12, (3,), arrival())
    held.commit(13)
    assert held.token_ids == [1, 2, 3]


@pytest.mark.parametrize(("start", "kind"), [(10, "below"), (11, "below"), (13, "beyond"), (9, "below")])
def test_a_write_elsewhere_is_refused(start: int, kind: str) -> None:
    """Below the committed length nothing is written, beyond it there would be a hole."""
    held = shard(committed=(1, 2))
    with pytest.raises(Fenced, match=f"append at {start} lies {kind}"):
        held.append(start, (7,), arrival())
    assert (held.pending, held.token_ids) == (None, [1, 2])


def test_a_chunk_ends_within_the_reserved_range() -> None:
    """The last reserved position may be written, the one after it not."""
    held = shard(first=10, end=12)
    with pytest.raises(Fenced, match="append to 13 leaves"):
        held.append(10, (1, 2, 3), arrival())
    held.append(10, (1, 2), arrival())


def test_a_superseded_step_writes_nothing_more() -> None:
    """A step whose chunk another took the place of is fenced, however many layers it lacks."""
    held, late = shard(), arrival(1)
    held.append(10, (1, 2), late)
    held.append(10, (1, 2), arrival())
    with pytest.raises(Fenced, match="a later step writes there") as caught:
        late.check(1)
    assert caught.value.metadata == {"shards": "5"}
    held.commit(12)
    assert held.token_ids == [1, 2]


@CASES
@given(
    committed=st.lists(st.integers(0, 1), max_size=8),
    pending=st.integers(0, 3),
    token_ids=st.lists(st.integers(0, 1), max_size=24),
)
def test_truncation_keeps_the_longest_confirmed_prefix(
    committed: list[int], pending: int, token_ids: list[int]
) -> None:
    """min(committed, longest common prefix) is left; only a token that differs contradicts, and is named."""
    held = shard(committed=tuple(committed))
    if pending:
        held.append(held.committed, (1,) * pending, arrival())
    confirmed = token_ids[10:]
    longest = max(n for n in range(len(committed) + 1) if committed[:n] == confirmed[:n])
    differs_at = held.truncate(token_ids)
    assert (held.token_ids, held.pending) == (committed[:longest], None)
    assert differs_at == (None if longest == min(len(committed), len(confirmed)) else 10 + longest)


def test_slots_follow_the_block_list() -> None:
    """A position's slot lies in its block, wherever that is."""
    held = shard()
    assert [held.slot(position) for position in (10, 13, 14, 21, 22, 29)] == [36, 39, 8, 15, 28, 3]
