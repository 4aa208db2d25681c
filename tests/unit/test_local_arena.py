"""An arena without servers: what its membership's thread sees, and the thread that looks after it."""

from __future__ import annotations

from concurrent import futures

import pytest

from cluster.config import AttentionConfig, TierConfig
from cluster.types import Epoch, Generation, SequenceKey, WorkerId
from tests.attention_builders import build_geometry
from workers.attention.core import AttentionCore
from workers.dense.__main__ import local_arena

WAIT_S = 5.0
LEASE_MS = 200


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


def test_a_bug_in_the_care_of_a_store_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails once is logged and tried again: leases must end whatever happens."""
    geometry = build_geometry()
    config = AttentionConfig(block_tokens=geometry.block_tokens, lease_ms=LEASE_MS)
    tier = TierConfig(arena=4 * geometry.block_bytes)
    with AttentionCore(config, tier, geometry, WorkerId("attention-0"), Epoch(1)) as core:
        expire, failures = core.store.expire, iter([True])

        def fails_once() -> tuple[SequenceKey, ...]:
            if next(failures, False):
                raise ZeroDivisionError("a bug")
            return expire()

        monkeypatch.setattr(core.store, "expire", fails_once)
        core.store.reserve(SequenceKey("request"), Generation(1), 0, 1)
        assert core.store.empty.wait(WAIT_S)
        assert next(failures, None) is None
