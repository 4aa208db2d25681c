"""Attention workers of two arenas as processes: a request over both, moves between them, and their ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from anabranch.v1 import inference_pb2
from tests.models import Reference, random_prompt, reference_tokens
from tests.tiers import (
    BEST,
    BEST_TOKENS,
    SLOW,
    SLOW_TOKENS,
    WAIT_S,
    Stream,
    assert_moves_both_ways,
    metrics,
    model_of_long_sequences,
    moves,
    two_tiers,
    used_tokens,
)

PROMPT = random_prompt(900, seed=43)
COUNT = 700
OTHERS = ("attention-1", "attention-1.1")


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of_long_sequences(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(name="expected", scope="module")
def _expected(model: Path) -> Reference:
    """What transformers says, whatever holds the cache."""
    (reference,) = reference_tokens(model, [PROMPT], COUNT)
    assert reference.sharp_length() == COUNT, "a near-tie would end the comparison: take another seed"
    return reference


@pytest.mark.system
def test_a_request_larger_than_the_best_tier_lies_in_both(
    model: Path, expected: Reference, tmp_path: Path
) -> None:
    """One worker serves what its first arena cannot hold: that is filled, the next holds the rest, the tokens
    are the reference's, and everything is free again. The process's metrics name both arenas.
    """
    with two_tiers(model, tmp_path, 1) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(20)
        used = used_tokens(cluster)
        assert used[BEST] == BEST_TOKENS
        assert len(PROMPT) - BEST_TOKENS < used[SLOW] < SLOW_TOKENS
        stream.assert_ends_as(expected)
        cluster.assert_nothing_leaks()
        arenas = [m for m in cluster.members() if m.role == inference_pb2.ROLE_ATTENTION]
        assert [(m.worker_id, m.slot, m.tier) for m in arenas] == [(BEST, BEST, 0), (SLOW, BEST, 1)]
        assert len({member.process_id for member in arenas}) == 1
        said = metrics(cluster, BEST)
        for name in (BEST, SLOW):
            assert f'anabranch_attention_blocks{{arena="{name}",state="free"}}' in said


def test_blocks_move_between_tiers_while_decoding(model: Path, tmp_path: Path) -> None:
    """A part of a full first arena goes below; when it has emptied, what had to lie there goes up; no token
    changes. (Both arenas are in host memory; tests/gpu has one on a device.)
    """
    assert_moves_both_ways(model, tmp_path)


@pytest.mark.system
def test_a_killed_process_takes_both_arenas_along(model: Path, expected: Reference, tmp_path: Path) -> None:
    """SIGKILL in the middle of a stream: what both arenas held is computed again on the other worker's, no
    token is wrong, repeated or missing, and a successor joins with two new ones.
    """
    with two_tiers(model, tmp_path, 2) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(4)
        assert all(used_tokens(cluster)[name] > 0 for name in (BEST, SLOW))
        cluster.kill(BEST)
        stream.assert_ends_as(expected)
        cluster.launch("attention", 0)
        successor = cluster.processes[BEST].pid

        def has_joined(members: Sequence[inference_pb2.Member]) -> bool:
            ready = [m for m in members if m.state == inference_pb2.MEMBER_STATE_READY]
            return [m.worker_id for m in ready if m.process_id == successor] == [BEST, SLOW]

        cluster.wait(has_joined)
        cluster.assert_nothing_leaks()


@pytest.mark.system
def test_a_drain_empties_both_arenas(model: Path, expected: Reference, tmp_path: Path) -> None:
    """SIGTERM: the blocks of both arenas move to the other worker's while the stream goes on, nothing is
    computed again, and the process leaves with status 0.
    """
    with two_tiers(model, tmp_path, 2) as cluster, cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(4)
        assert all(used_tokens(cluster)[name] > 0 for name in (BEST, SLOW))
        leaving = cluster.drain(BEST)
        assert leaving.wait(WAIT_S) == 0, cluster.log(BEST)
        stream.assert_ends_as(expected)
        moved = moves(cluster)
        assert {source for _, source, _ in moved} == {BEST, SLOW}
        assert {target for _, _, target in moved} <= set(OTHERS)
        assert "anabranch_dense_tokens_lost_total 0.0" in metrics(cluster, "dense-0")
        cluster.assert_nothing_leaks()
