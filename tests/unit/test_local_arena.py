"""A dense worker's own cache as its membership's thread sees it."""

from __future__ import annotations

from concurrent import futures

from cluster.config import AttentionConfig, TierConfig
from cluster.types import Epoch, WorkerId
from tests.attention_builders import build_geometry
from workers.attention.core import AttentionCore
from workers.dense.__main__ import local_arena

WAIT_S = 5.0


def test_the_account_does_not_wait_for_a_computation() -> None:
    """While a long computation has the cache's turn, the membership hears what was free a moment ago."""
    geometry = build_geometry()
    config = AttentionConfig(block_tokens=geometry.block_tokens)
    tier = TierConfig(arena=4 * geometry.block_bytes)
    with (
        futures.ThreadPoolExecutor(1) as pool,
        AttentionCore(config, tier, geometry, WorkerId("dense-0-local"), Epoch(7)) as core,
    ):
        arena = local_arena(core)
        with core.store.turns:
            member = pool.submit(arena.member).result(WAIT_S)
    assert (member.blocks_capacity, member.blocks_free, member.is_local) == (4, 4, True)
