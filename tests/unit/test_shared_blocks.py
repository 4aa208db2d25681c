"""Sequences that share sealed blocks in a store: what is shared, what is copied, and that nobody edits it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from time import monotonic
from typing import Any

import pytest
import torch

from cluster import blocks
from cluster.errors import Fenced, InvalidRequest, Unavailable
from tests.attention_builders import Memory, build_geometry, build_memory, chunk, generation, key, reading
from workers.attention.prepared_step import PreparedStep
from workers.attention.shard import LayerArrival
from workers.peer import Acquisition, ShardPrefix

GEOMETRY = build_geometry()
TENANT = ShardPrefix("tenant")


def grown(
    memory: Memory, name: str, tokens: int, *, token: int = 0, prefix: ShardPrefix = TENANT, room: int = 20
) -> PreparedStep:
    """A sequence of one shard, `tokens` of it committed; token ids are position + `token`. Its next step."""
    shard = memory.store.reserve(key(name), generation(1), 0, room, prefix).shard
    memory.run(chunk(shard, 0, tokens, token=token))
    return memory.begin(chunk(shard, tokens, 1, token=token))


def acquire(
    memory: Memory, name: str, tokens: int, *, prefix: ShardPrefix = TENANT, life: int = 1
) -> Acquisition:
    """Ask for what lies there of tokens 0, 1, 2, ..."""
    return memory.store.acquire(key(name), generation(life), 0, range(tokens), prefix)


def test_a_second_sequence_refers_to_sealed_blocks_and_copies_the_open_one() -> None:
    """Of eleven tokens two blocks of four are the first sequence's own, and three tokens are a copy."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 11)
    held = acquire(memory, "b", 11).shard
    assert held is not None
    assert (held.shard.first, held.committed_tokens, held.shard.end, held.blocks) == (0, 11, 11, 3)
    account = memory.store.audit()
    assert (account.sealed_referenced, account.open, account.reserved) == (2, 2, 2)
    torch.testing.assert_close(memory.contents("b", 11), memory.contents("a", 11))


def test_each_goes_on_in_blocks_of_its_own() -> None:
    """After the common prefix two sequences write different tokens, and neither sees the other's."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 10)
    held = acquire(memory, "b", 10).shard
    assert held is not None
    memory.store.reserve(key("b"), generation(1), 10, 16, TENANT)
    before = memory.contents("a", 10)
    memory.run(chunk(held.shard, 10, 4, token=50))
    memory.begin(reading(held.shard, 14))
    assert memory.committed("b") == [(0, 14)]
    torch.testing.assert_close(memory.contents("a", 10), before)
    torch.testing.assert_close(memory.contents("b", 10), before)
    assert not memory.contents("b", 14).isnan().any()


def test_only_committed_blocks_are_found() -> None:
    """A block whose step no later one has confirmed is not shared, full as it may be."""
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key("a"), generation(1), 0, 20, TENANT).shard
    memory.run(chunk(shard, 0, 8))
    assert acquire(memory, "b", 8).shard is None
    memory.begin(chunk(shard, 8, 1))
    held = acquire(memory, "b", 8).shard
    assert held is not None
    assert held.committed_tokens == 8


def test_a_release_makes_the_last_step_certain_where_all_its_layers_arrived() -> None:
    """A release that says what was computed leaves the full blocks of the last step as a cache; without it,
    or without one of its layers, nothing of that step stays.
    """
    for computed_end, last_layer_arrives, found in ((8, True, 8), (7, True, 4), (0, True, 0), (8, False, 0)):
        memory = build_memory(sharing=True)
        shard = memory.store.reserve(key("a"), generation(1), 0, 20, TENANT).shard
        row = chunk(shard, 0, 8)
        step = memory.begin(row)
        for layer in range(GEOMETRY.layers if last_layer_arrives else GEOMETRY.layers - 1):
            memory.append(step, [row], layer)
        memory.store.release(key("a"), generation(1), computed_end)
        held = acquire(memory, "b", 8).shard
        assert (held.committed_tokens if held else 0) == found
        assert memory.store.audit().sealed_cached == 0


@pytest.mark.parametrize("other", [ShardPrefix("tenants"), ShardPrefix("")])
def test_tenants_share_nothing(other: ShardPrefix) -> None:
    """The same tokens of another tenant are found neither sealed nor open."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 11)
    assert acquire(memory, "b", 11, prefix=other).shard is None
    assert memory.store.audit().sealed_referenced == 2


def test_released_blocks_stay_until_the_room_is_needed() -> None:
    """A released sequence's sealed blocks are a cache: found again, counted as available, and given up with
    the end of the sequence before its beginning.
    """
    memory = build_memory(blocks=6, sharing=True)
    grown(memory, "a", 17)
    assert memory.store.release(key("a"), generation(1)) == 5
    account = memory.store.audit()
    assert (account.free, account.sealed_cached, account.available) == (2, 4, 6)
    memory.store.reserve(key("c"), generation(1), 0, 16)
    held = acquire(memory, "b", 17).shard
    assert held is not None
    assert held.committed_tokens == 8
    assert memory.store.audit().available == 0


def test_a_duplicate_gives_way_to_the_older_block() -> None:
    """Two sequences compute the same tokens: once certain, the second refers to the first one's blocks."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    grown(memory, "b", 9)
    account = memory.store.audit()
    assert account.sealed_referenced == 2
    torch.testing.assert_close(memory.contents("a", 8), memory.contents("b", 8))


def test_truncation_into_a_shared_block_drops_the_reference() -> None:
    """A take-over that confirms six of eight tokens leaves one block of four; the other sharer keeps both."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    acquire(memory, "b", 9)
    (kept,) = memory.store.adopt(key("b"), generation(2), [0, 1, 2, 3, 4, 5, 99, 7]).shards
    assert (kept.committed_tokens, kept.shard.end, kept.blocks) == (4, 4, 1)
    assert memory.committed("a") == [(0, 9)]
    memory.store.audit()
    grown_again = memory.store.reserve(key("b"), generation(2), 4, 12, TENANT).shard
    before = memory.contents("a", 9)
    memory.run(chunk(grown_again, 4, 6, life=2, token=70))
    torch.testing.assert_close(memory.contents("a", 9), before)


def test_truncation_of_what_nobody_shares_keeps_every_confirmed_token() -> None:
    """The only referrer's block loses its identity and is written again from the first token that differs."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    (kept,) = memory.store.adopt(key("a"), generation(2), [0, 1, 2, 3, 4, 5, 99, 7]).shards
    assert (kept.committed_tokens, kept.shard.end) == (6, 20)
    assert memory.store.audit().sealed_referenced == 1
    held = acquire(memory, "b", 8).shard
    assert held is not None
    assert held.committed_tokens == 6


def test_a_shard_behind_another_worker_shares_once_its_prefix_is_known() -> None:
    """A shard that begins at 8 has no identity until somebody says what lies before it."""
    memory = build_memory(sharing=True)
    before = blocks.chain(blocks.root(GEOMETRY, "tenant"), range(8), 4)[-1]
    known = ShardPrefix("tenant", before)
    shard = memory.store.reserve(key("a"), generation(1), 8, 16, TENANT).shard
    memory.run(chunk(shard, 8, 5))
    memory.begin(chunk(shard, 13, 1))
    assert memory.store.acquire(key("b"), generation(1), 8, range(8, 13), known).shard is None
    memory.store.reserve(key("a"), generation(1), 16, 20, known)
    memory.begin(chunk(shard, 13, 1))
    held = memory.store.acquire(key("b"), generation(1), 8, range(8, 13), known).shard
    assert held is not None
    assert (held.shard.first, held.committed_tokens) == (8, 5)


@pytest.mark.parametrize("first", [1, 6])
def test_blocks_off_the_grid_are_private(first: int) -> None:
    """A shard that does not begin at a multiple of the block size has no identities."""
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key("a"), generation(1), first, 20, TENANT).shard
    memory.run(chunk(shard, first, 9))
    memory.begin(chunk(shard, first + 9, 1))
    assert memory.store.acquire(key("b"), generation(1), first, range(first, 20), TENANT).shard is None
    memory.store.release(key("a"), generation(1))
    assert memory.store.audit().sealed_cached == 0


def test_an_acquisition_is_a_reservation_like_others() -> None:
    """Fenced below the generation in force, refused over an own shard and while draining; nothing leaks."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    acquire(memory, "b", 9, life=3)
    with pytest.raises(Fenced):
        acquire(memory, "b", 9, life=2)
    with pytest.raises(InvalidRequest):
        acquire(memory, "b", 9, life=3)
    memory.store.draining = True
    with pytest.raises(Unavailable):
        acquire(memory, "c", 9)
    assert memory.store.audit().sealed_referenced == 2
    memory.store.release(key("a"), generation(1))
    memory.store.release(key("b"), generation(3))
    account = memory.store.audit()
    assert (account.sealed_referenced, account.sealed_cached, account.available) == (0, 2, 16)


def test_without_sharing_nothing_is_found_or_kept() -> None:
    """Where sharing is off a release frees everything."""
    memory = build_memory()
    grown(memory, "a", 11)
    assert acquire(memory, "b", 11).shard is None
    memory.store.release(key("a"), generation(1))
    assert memory.store.audit().free == 16


def test_a_lease_that_ends_frees_no_block_that_is_shared() -> None:
    """The first sequence's lease runs out; what the second refers to stays."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    memory.clock.advance(0.9)
    acquire(memory, "b", 9)
    before = memory.contents("b", 8)
    memory.clock.advance(0.9)
    assert memory.store.expire() == (key("a"),)
    torch.testing.assert_close(memory.contents("b", 8), before)
    assert memory.store.audit().sealed_referenced == 2


def test_no_block_changes_hands_under_a_step() -> None:
    """While a step is on its way a reservation tells the identity of what lies before its shard: the blocks
    the step reads stay the sequence's until the step is over."""
    memory = build_memory(sharing=True)
    known = ShardPrefix("tenant", blocks.chain(blocks.root(GEOMETRY, "tenant"), range(8), 4)[-1])
    first = memory.store.reserve(key("a"), generation(1), 8, 20, known).shard
    memory.run(chunk(first, 8, 8))
    memory.begin(chunk(first, 16, 1))  # publishes two blocks
    second = memory.store.reserve(key("b"), generation(1), 8, 20, TENANT).shard
    memory.run(chunk(second, 8, 8))
    step = memory.begin(chunk(second, 16, 1))
    (span,) = step.spans
    memory.store.reserve(key("b"), generation(1), 20, 24, known)  # room ahead, asked for beside the step
    other = memory.store.reserve(key("c"), generation(1), 0, 4 * memory.store.available).shard
    with memory.store.turns:
        taken = memory.store.shard(other.shard, generation(1)).blocks
    assert not set(taken) & set(span.blocks)


def test_a_release_waits_for_the_last_layers_it_overtook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a sequence comes on another way than its last keys and values: they arrive while the release
    waits, and the full blocks of that step are found by the next sequence.
    """
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key("a"), generation(1), 0, 20, TENANT).shard
    rows = [chunk(shard, 0, 9)]
    step = memory.begin(*rows)
    memory.append(step, rows, 0)
    monkeypatch.setattr(LayerArrival, "wait", lambda _arrival, _timeout_s: memory.append(step, rows, 1))
    memory.store.release(key("a"), generation(1), 9)
    held = acquire(memory, "b", 9).shard
    assert held is not None
    assert held.committed_tokens == 8


class _Watched(list[int]):
    """Tokens that tell when they are first looked at."""

    def __init__(self, tokens: Iterable[int]) -> None:
        super().__init__(tokens)
        self.were_read = threading.Event()

    def __getitem__(self, index: Any) -> Any:
        """See `list`."""
        self.were_read.set()
        return super().__getitem__(index)


def test_a_prompt_is_hashed_before_its_turn() -> None:
    """While a kernel has the store's turn, whoever asks for a long prefix computes its identities."""
    memory = build_memory(sharing=True)
    grown(memory, "a", 9)
    tokens = _Watched(range(8))
    found: list[Acquisition] = []

    def ask() -> None:
        found.append(memory.store.acquire(key("b"), generation(1), 0, tokens, TENANT))

    asking = threading.Thread(target=ask)
    with memory.store.turns:
        asking.start()
        assert tokens.were_read.wait(20)
    asking.join(20)
    assert found[0].shard is not None
    assert found[0].shard.committed_tokens == 8


def test_a_release_waits_for_no_step_that_is_not_over() -> None:
    """Of a step that was given up the layers never come: an abort is not delayed, and shares nothing."""
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key("a"), generation(1), 0, 20, TENANT).shard
    rows = [chunk(shard, 0, 9)]
    memory.append(memory.begin(*rows), rows, 0)
    began_s = monotonic()
    memory.store.release(key("a"), generation(1), 0)
    assert monotonic() - began_s < 0.4
    assert memory.store.audit().free == 16
