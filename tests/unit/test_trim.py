"""What is out of every window leaves a store: identities of what stays, leases, steps under way."""

from __future__ import annotations

import pytest
import torch

from cluster import blocks
from cluster.errors import Fenced
from tests.attention_builders import build_geometry, build_memory, chunk, generation, key, reading
from workers.kernels.select import select
from workers.kernels.signature import LayerCache, Span
from workers.peer import ShardPrefix

TENANT = ShardPrefix("tenant")
KERNEL = select("torch", "cpu")


def test_shards_out_of_sight_go_whole_and_the_sequence_stays() -> None:
    """Shards before the position are freed, one after it is left alone, one around it is cut; with nothing
    left the lease and the generation still stand.
    """
    memory = build_memory()
    shards = [memory.reserve("a", first, first + 8) for first in (0, 10, 20)]
    for shard in shards:
        memory.run(chunk(shard, shard.first, 8, visible=(shard.first, shard.first)))
        memory.begin(reading(shard, 28))
    assert memory.store.trim(key(), generation(1), 16) == 3
    assert memory.committed("a") == [(14, 18), (20, 28)]
    assert memory.store.trim(key(), generation(1), 28) == 3
    assert memory.committed("a") == []
    assert memory.store.renew([key()]) == ()
    assert memory.store.audit().free == 16
    assert memory.store.trim(key("nobody"), generation(1), 28) == 0
    assert memory.reserve("a", 28, 30).first == 28
    with pytest.raises(Fenced):
        memory.reserve("a", 40, 42, life=0)


def test_what_stays_keeps_its_identity() -> None:
    """Blocks that were published stay as a cache, and those sealed after a trim are published under the
    identities they would have had without it.
    """
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key(), generation(1), 0, 20, TENANT).shard
    memory.run(chunk(shard, 0, 10))
    memory.begin(reading(shard, 10))
    assert memory.store.trim(key(), generation(1), 9) == 2
    assert memory.store.audit().sealed_cached == 2
    memory.run(chunk(shard, 10, 6, visible=(8, 10)))
    memory.begin(reading(shard, 16, visible=(8, 16)))
    hashes = blocks.chain(blocks.root(build_geometry(), "tenant"), range(16), 4)
    with memory.store.turns:
        held = memory.store.shard(shard.shard, generation(1))
        assert (held.parent, held.hashes) == (hashes[1], hashes[2:])
    found = memory.store.acquire(key("b"), generation(1), 0, range(16), TENANT).shard
    assert found is not None
    assert found.committed_tokens == 16


def test_an_unknown_prefix_stays_unknown() -> None:
    """A shard whose beginning has no identity learns none from the position where it begins after a trim."""
    memory = build_memory(sharing=True)
    shard = memory.store.reserve(key(), generation(1), 4, 20, TENANT).shard
    memory.run(chunk(shard, 4, 10))
    memory.begin(reading(shard, 14))
    memory.store.trim(key(), generation(1), 12)
    memory.store.reserve(key(), generation(1), 20, 24, TENANT)
    with memory.store.turns:
        held = memory.store.shard(shard.shard, generation(1))
        assert (held.first, held.parent, held.hashes) == (12, None, [])


def test_a_step_under_way_does_not_notice() -> None:
    """Blocks given up between two layers may hold another's numbers already: a step whose rows see only what
    is kept attends that, and what it appends is there.
    """
    memory = build_memory()
    mine = memory.reserve("a", 0, 20)
    memory.run(chunk(mine, 0, 13))
    rows = [chunk(mine, 13, 1, visible=(9, 13))]
    step = memory.begin(*rows)
    memory.append(step, rows, layer=0)
    assert memory.store.trim(key(), generation(1), 9) == 2
    other = memory.reserve("b", 0, 8)
    memory.run(chunk(other, 0, 8))
    query = torch.randn(1, 4, 8)
    with memory.store.turns:
        found = step.attend(1, query, step.spans, KERNEL, None)
    pairs = [memory.written[1, int(mine.shard), position] for position in range(9, 13)]
    cache = LayerCache(torch.stack([k for k, _ in pairs])[None], torch.stack([v for _, v in pairs])[None])
    wanted = KERNEL.attend(query, [Span(0, 1, 13, (0,), 9, 0, 4)], cache, 8**-0.5)
    torch.testing.assert_close(found.out, wanted.out)
    memory.append(step, rows, layer=1)
    memory.begin(reading(mine, 14, visible=(8, 14)))
    assert memory.committed("a") == [(8, 14)]


def test_a_step_that_sees_what_was_given_up_fails_closed() -> None:
    """It cannot be of the sequence's present: its numbers may be another's already."""
    memory = build_memory()
    mine = memory.reserve("a", 0, 20)
    memory.run(chunk(mine, 0, 13))
    rows = [chunk(mine, 13, 1, visible=(7, 13))]
    step = memory.begin(*rows)
    memory.store.trim(key(), generation(1), 9)
    with memory.store.turns, pytest.raises(Fenced, match="trimmed") as caught:
        step.attend(0, torch.randn(1, 4, 8), step.spans, KERNEL, None)
    assert caught.value.metadata["shards"] == str(mine.shard)
