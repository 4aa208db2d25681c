"""A step resolved once: it reads exactly the named slots, writes exactly its own, and sees a loss at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Fenced, InvalidRequest
from cluster.types import ShardId, ShardRef
from tests.attention_builders import Memory, build_memory, chunk, generation, key, reading
from workers.attention.prepared_step import PreparedStep, slices
from workers.kernels.reference import ReferenceKernel
from workers.kernels.select import select
from workers.kernels.signature import Kernel, LayerCache, Span
from workers.lanes.messages import PlanRow
from workers.partials import Partial, merge

torch.set_num_threads(1)

KERNELS = [ReferenceKernel(), select("auto", "cpu")]
BLOCK_TOKENS = (1, 7, 16)
SCALE = 8**-0.5


def gathered(memory: Memory, row: PlanRow, query: torch.Tensor, layer: int, window: int | None) -> Partial:
    """The reference over a copy of exactly the keys and values the row names."""
    places = [(layer, int(row.shard), position) for position in range(row.visible_first, row.visible_end)]
    if not places:
        return Partial(torch.zeros(query.shape), torch.full(query.shape[:2], -torch.inf))
    keys, values = zip(*(memory.written[place] for place in places), strict=True)
    cache = LayerCache(torch.stack(keys)[None], torch.stack(values)[None])
    span = Span(0, row.count, row.start, (0,), row.visible_first, 0, len(places))
    result = ReferenceKernel().attend(query, [span], cache, SCALE, window)
    return Partial(result.out, result.lse)


def assert_close(found: Partial, wanted: Partial) -> None:
    """Equal up to rounding in single precision."""
    torch.testing.assert_close(found.out, wanted.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, wanted.lse, atol=1e-5, rtol=1e-5)


def assert_reads(memory: Memory, rows: list[PlanRow], kernel: Kernel, window: int | None = None) -> None:
    """A step over `rows` attends, in every layer, what was written under the positions they name."""
    step = memory.begin(*rows)
    query = torch.randn(step.rows, 4, 8)
    for layer in range(memory.arena.geometry.layers):
        with memory.store.turns:
            found = step.attend(layer, query, step.spans, kernel, window)
        start = 0
        for row in rows:
            part = slice(start, start + row.count)
            start += row.count
            wanted = gathered(memory, row, query[part], layer, window)
            assert_close(Partial(found.out[part], found.lse[part]), wanted)


def fill(memory: Memory, shard: ShardRef, chunks: list[int]) -> int:
    """Write and commit chunks of these sizes; the position after them."""
    start = shard.first
    for count in chunks:
        memory.run(chunk(shard, start, count))
        start += count
    memory.begin(reading(shard, start))
    return start


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block_tokens", BLOCK_TOKENS)
def test_a_step_attends_exactly_the_named_slots(
    block_tokens: int, window: int | None, kernel: Kernel
) -> None:
    """Several sequences, scattered blocks, any part visible: every row equals attention over a copy."""
    torch.manual_seed(block_tokens)
    memory = build_memory(blocks=120, block_tokens=block_tokens, layout=kernel.layout)
    shards = [memory.reserve(name, first, first + 6) for name, first in (("a", 0), ("b", 3), ("c", 0))]
    shards = [
        memory.reserve(ref_name, ref.end, ref.first + 30) for ref_name, ref in zip("abc", shards, strict=True)
    ]
    ends = [fill(memory, shard, [5, 1, 9]) for shard in shards]
    rows = [
        chunk(shards[0], ends[0], 3),
        reading(shards[1], 40, 2, visible=(6, 17)),
        reading(shards[2], ends[2], visible=(4, 4)),
    ]
    assert_reads(memory, rows, kernel, window)


@settings(max_examples=40, deadline=None)
@given(
    block_tokens=st.sampled_from(BLOCK_TOKENS),
    first=st.integers(0, 20),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    data=st.data(),
)
def test_appends_land_where_later_steps_read_them(
    block_tokens: int, first: int, chunks: list[int], data: st.DataObject
) -> None:
    """Chunks of any size over any edges of blocks: what a later row names is what was written there."""
    memory = build_memory(blocks=120, block_tokens=block_tokens, layout=KERNELS[1].layout)
    shard = memory.reserve("a", first, first + sum(chunks) + 1)
    end = fill(memory, shard, chunks)
    visible = sorted(data.draw(st.tuples(st.integers(first, end), st.integers(first, end))))
    assert_reads(memory, [reading(shard, end, 2, visible=(visible[0], visible[1]))], KERNELS[1])


@pytest.mark.parametrize("block_tokens", BLOCK_TOKENS)
def test_an_append_touches_only_its_own_slots(block_tokens: int) -> None:
    """A chunk over several blocks fills its slots in its layer and not one number elsewhere."""
    memory = build_memory(blocks=40, block_tokens=block_tokens)
    memory.reserve("other", 0, 3)
    shard = memory.reserve("a", 5, 40)
    row = chunk(shard, 5, 18)
    step = memory.begin(row)
    memory.append(step, [row], layer=0)
    with memory.store.turns:
        blocks = memory.store.shard(shard.shard, generation(1)).blocks
    keys = memory.arena.layer(0).key
    for position in range(5, 23):
        block, offset = divmod(position - 5, block_tokens)
        assert torch.equal(keys[blocks[block], offset], memory.written[0, int(shard.shard), position][0])
    assert int(keys.isfinite().all(3).all(2).sum()) == 18
    assert memory.arena.layer(1).key.isnan().all()


def test_shards_of_one_sequence_sum_to_the_whole() -> None:
    """Two shards of a sequence on one worker, a row each: their partials merge to attention over both."""
    memory = build_memory(blocks=40, block_tokens=7, layout=KERNELS[1].layout)
    low, high = memory.reserve("a", 0, 10), memory.reserve("a", 12, 30)
    fill(memory, low, [4, 6])
    end = fill(memory, high, [1, 8])
    step = memory.begin(reading(low, end), chunk(high, end, 1))
    query = torch.randn(1, 4, 8)
    with memory.store.turns:
        found = step.attend(1, query.repeat(2, 1, 1), step.spans, KERNELS[1], None)
    places = [(int(low.shard), position) for position in range(10)]
    places += [(int(high.shard), position) for position in range(12, end)]
    pairs = [memory.written[1, *place] for place in places]
    cache = LayerCache(torch.stack([k for k, _ in pairs])[None], torch.stack([v for _, v in pairs])[None])
    whole = ReferenceKernel().attend(query, [Span(0, 1, end, (0,), 0, 0, len(pairs))], cache, SCALE)
    parts = [Partial(found.out[row : row + 1], found.lse[row : row + 1]) for row in range(2)]
    assert_close(merge(parts), Partial(whole.out, whole.lse))


def take(memory: Memory, how: str) -> None:
    """Take sequence `a` away."""
    if how == "release":
        memory.store.release(key("a"), generation(1))
    elif how == "adopt":
        memory.store.adopt(key("a"), generation(2), range(100))
    else:
        memory.reserve("a", 0, 8, life=2)


@pytest.mark.parametrize("how", ["release", "adopt", "reserve"])
def test_a_shard_taken_in_the_middle_is_noticed(how: str) -> None:
    """Between two layers a shard is released or taken over: attention fails closed, and nothing more is
    written there; the other sequence of the step keeps all its layers.
    """
    memory = build_memory(layout=KERNELS[1].layout)
    mine, other = memory.reserve("a", 0, 12), memory.reserve("b", 0, 12)
    fill(memory, mine, [5])
    fill(memory, other, [5])
    rows = [chunk(other, 5, 1), chunk(mine, 5, 1)]
    step = memory.begin(*rows)
    memory.append(step, rows, layer=0)
    take(memory, how)
    with memory.store.turns, pytest.raises(Fenced, match="released or taken over") as caught:
        step.attend(1, torch.randn(2, 4, 8), step.spans, KERNELS[1], None)
    assert caught.value.metadata["shards"] == str(mine.shard)
    before = memory.arena.layer(1).key[:3].clone()  # the three blocks that were sequence a's
    memory.append(step, rows, layer=1)
    torch.testing.assert_close(memory.arena.layer(1).key[:3], before, rtol=0, atol=0, equal_nan=True)
    memory.begin(chunk(other, 6, 1))
    assert memory.committed("b") == [(0, 6)]


def test_changes_elsewhere_do_not_end_a_step() -> None:
    """Sequences come, go and change owner while a step runs; its own shards are all that matters."""
    memory = build_memory(blocks=40, layout=KERNELS[1].layout)
    memory.reserve("gone", 0, 12)
    taken = memory.reserve("taken", 0, 12)
    fill(memory, taken, [5])
    mine = memory.reserve("a", 0, 12)
    fill(memory, mine, [5])
    row = chunk(mine, 5, 1)
    step = memory.begin(row)
    memory.store.release(key("gone"), generation(1))
    memory.append(step, [row], layer=0)
    memory.store.adopt(key("taken"), generation(2), range(5))
    memory.append(step, [row], layer=1)
    with memory.store.turns:
        step.attend(1, torch.randn(1, 4, 8), step.spans, KERNELS[1], None)
    memory.begin(chunk(mine, 6, 1))
    assert memory.committed("a") == [(0, 6)]


def test_a_late_message_never_writes_below_what_is_certain() -> None:
    """A step left behind by a broken lane is fenced once another writes there: its rows change nothing."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    row = chunk(shard, 0, 3)
    late = memory.begin(row)
    memory.append(late, [row], layer=0)
    fill(memory, shard, [3])
    with pytest.raises(Fenced, match="a later step writes there") as caught:
        memory.append(late, [row], layer=1)
    assert caught.value.metadata["shards"] == str(shard.shard)
    assert_reads(memory, [reading(shard, 3)], KERNELS[0])


def test_a_layer_that_failed_half_way_has_not_arrived() -> None:
    """When writing raises, the layer does not count: nothing is committed until it was written whole."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    row = chunk(shard, 0, 2)
    step = memory.begin(row)
    memory.append(step, [row], layer=0)
    nowhere = torch.empty(2, 2, 8, device="meta")
    with memory.store.turns, pytest.raises(RuntimeError):
        step.append(1, torch.randn(2, 2, 8), nowhere)
    with pytest.raises(Fenced, match="miss layers"):
        memory.begin(chunk(shard, 2, 1))
    memory.append(step, [row], layer=1)
    memory.begin(chunk(shard, 2, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cache_on_a_gpu_serves_lanes_on_the_host() -> None:
    """Rows in host memory are written and attended where the cache lies, as they are on the host."""
    answers = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        kernel = select("auto", device)
        memory = build_memory(blocks=40, device=device, layout=kernel.layout)
        mine, other = memory.reserve("a", 0, 30), memory.reserve("b", 0, 30)
        memory.run(chunk(mine, 0, 20), chunk(other, 0, 11))
        step = memory.begin(chunk(mine, 20, 3), chunk(other, 11, 1))
        take(memory, "release")
        memory.append(step, [chunk(mine, 20, 3), chunk(other, 11, 1)], layer=0)
        step = memory.begin(chunk(other, 11, 2))
        with memory.store.turns:
            answers.append(step.attend(1, torch.randn(2, 4, 8), step.spans, kernel, None))
    assert_close(Partial(answers[1].out.cpu(), answers[1].lse.cpu()), answers[0])


@pytest.mark.parametrize("layer", [-1, 1, 2, 99])
def test_a_layer_out_of_turn_is_refused(layer: int) -> None:
    """A layer that is not due, or that the model does not have, is fenced; the due one still arrives."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    row = chunk(shard, 0, 2)
    step = memory.begin(row)
    with pytest.raises(Fenced, match=f"layer {layer} arrived"):
        memory.append(step, [row], layer)
    memory.append(step, [row], 0)
    memory.append(step, [row], 1)
    with pytest.raises(Fenced, match="arrived after all 2 layers"):
        memory.append(step, [row], 2)
    memory.begin(chunk(shard, 2, 1))


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 2, 8), (2, 1, 8), (2, 2, 4), (4, 8)])
def test_keys_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Rows, heads and head size must be those of the plan and the geometry."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    step = memory.begin(chunk(shard, 0, 2))
    good = torch.zeros(2, 2, 8)
    for pair in ((torch.zeros(shape), good), (good, torch.zeros(shape))):
        with memory.store.turns, pytest.raises(InvalidRequest, match="are due"):
            step.append(0, *pair)


def test_all_shards_at_fault_are_named_and_nothing_is_announced() -> None:
    """One error names every shard that is gone, stale, incomplete or overwritten; the good row waits."""
    memory = build_memory(blocks=40)
    names = ("good", "stale", "blind", "below")
    good, stale, blind, below = (memory.reserve(name, 0, 12) for name in names)
    fill(memory, below, [4])
    gone = replace(good, shard=ShardId(99))
    before = memory.store.audit()
    bad = [
        reading(gone, 3),
        chunk(stale, 0, 1, life=2),
        reading(blind, 5),
        chunk(below, 2, 1, visible=(0, 1)),
    ]
    with pytest.raises(Fenced, match="and 3 more") as caught:
        memory.begin(chunk(good, 0, 5), *bad)
    at_fault = (99, *(int(ref.shard) for ref in (stale, blind, below)))
    assert caught.value.metadata["shards"] == ",".join(map(str, at_fault))
    assert memory.store.audit() == before


GOOD = PlanRow(ShardId(1), generation(1), 5, 1, 0, 5, (5,))


@pytest.mark.parametrize(
    "row",
    [
        replace(GOOD, count=0, token_ids=()),
        replace(GOOD, count=2),
        replace(GOOD, start=-1, visible_end=-1, visible_first=-1),
        replace(GOOD, visible_end=6),
        replace(GOOD, visible_first=4, visible_end=3),
    ],
    ids=["no rows", "ids missing", "before the start", "sees itself", "backwards"],
)
def test_a_row_that_contradicts_itself_is_refused(row: PlanRow) -> None:
    """Nonsense is the caller's mistake, not a fence, and leaves the store as it was."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    assert shard.shard == GOOD.shard
    fill(memory, shard, [5])
    before = memory.store.audit()
    with pytest.raises(InvalidRequest):
        memory.begin(row)
    assert memory.store.audit() == before
    memory.begin(GOOD)


def test_a_shard_is_named_once() -> None:
    """Two rows of one shard would write the same slots."""
    memory = build_memory()
    shard = memory.reserve("a", 0, 12)
    with pytest.raises(InvalidRequest, match="twice"):
        memory.begin(chunk(shard, 0, 2), chunk(shard, 0, 2))


SPANS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), max_size=6)


@settings(max_examples=150, deadline=None)
@given(sizes=SPANS, rows_most=st.integers(1, 12))
def test_slices_cover_every_row_once(sizes: list[tuple[int, int]], rows_most: int) -> None:
    """Groups are full but for the last and hold each row once, in order, at its own position."""
    spans: list[Span] = []
    row = 0
    for gap, count in sizes:
        spans.append(Span(row + gap, count, 100 + row, (3, 1), 40, 2, 7))
        row += gap + count
    groups = slices(spans, rows_most)
    pieces = [piece for group in groups for piece in group]
    found = [
        (piece.row_start + i, piece.query_position + i) for piece in pieces for i in range(piece.row_count)
    ]
    assert found == [(s.row_start + i, s.query_position + i) for s in spans for i in range(s.row_count)]
    assert [sum(piece.row_count for piece in group) for group in groups[:-1]] == [rows_most] * (
        len(groups) - 1
    )
    assert sum(piece.row_count for piece in groups[-1]) <= rows_most
    assert {replace(piece, row_start=0, row_count=1, query_position=0) for piece in pieces} <= {
        Span(0, 1, 0, (3, 1), 40, 2, 7)
    }


@pytest.mark.parametrize("rows_most", [1, 3, 4, 100])
def test_a_sliced_step_equals_a_whole_one(rows_most: int) -> None:
    """Attending slice by slice gives each row what attending at once gives it."""
    memory = build_memory(blocks=40)
    shards = [memory.reserve(name, 0, 30) for name in "ab"]
    rows = [
        chunk(shard, fill(memory, shard, [9]), count) for shard, count in zip(shards, (7, 2), strict=True)
    ]
    step: PreparedStep = memory.begin(*rows)
    query = torch.randn(step.rows, 4, 8)
    with memory.store.turns:
        whole = step.attend(0, query, step.spans, KERNELS[0], 6)
        parts = [step.attend(0, query, group, KERNELS[0], 6) for group in slices(step.spans, rows_most)]
    assert_close(merge(parts), whole)
