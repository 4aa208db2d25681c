"""Where every layer has a window, what no row will see any more leaves the pool, and nothing else changes.

Real attention workers and engines in this process; tokens are compared with transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster_harness import DenseCluster, Output, Shape, computed_tokens, counted, request
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from workers.dense.sequences import Submission

WINDOW = 24
PROMPT = random_prompt(70, 1)
COUNT = 180
TRIMMED_AFTER = 100
"""Tokens after which the prompt is out of sight, and given back."""

BLOCK_TOKENS = 8
BLOCKS_MOST = 20
"""Window, what is kept beside it, what is given back together and what is reserved ahead are 104 tokens, 13
blocks; some are cut by the edges of shards, and calls to give them back are under way. All would be 32.
"""

RECOMPUTED = "anabranch_dense_tokens_lost"

LOCAL = Shape(local_blocks=64, block_tokens=BLOCK_TOKENS)


def remote(workers: int, transport: str = "local") -> Shape:
    """Attention workers with shards of the window's size."""
    return Shape(
        attention_workers=workers,
        worker_blocks=64,
        block_tokens=BLOCK_TOKENS,
        shard_tokens=WINDOW,
        transports=(transport,),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral."""
    return tiny_model(tmp_path_factory.mktemp("mistral"), "mistral", sliding_window=WINDOW)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    """What transformers says, ten windows long."""
    (reference,) = reference_tokens(folder, [PROMPT], COUNT)
    assert reference.sharp_length() == COUNT, "every token is to be compared"
    return list(reference.tokens)


def used_blocks(cluster: DenseCluster) -> int:
    """Blocks that are held, on all workers."""
    cores = [worker.core for worker in cluster.workers.values()]
    accounts = [core.store.audit() for core in (*cores, *([cluster.local] if cluster.local else ()))]
    return sum(account.capacity - account.available for account in accounts)


def trimmed(output: Output) -> bool:
    """So many tokens came that the prompt has been given back."""
    return len(output.token_ids) >= TRIMMED_AFTER


def started(cluster: DenseCluster) -> Submission:
    """A sequence that has left its prompt behind."""
    submission = cluster.submit(request(PROMPT, COUNT))
    cluster.listener.wait(submission, trimmed)
    assert cluster.listener.output(submission).maps[-1][0].first > len(PROMPT)
    return submission


@pytest.mark.parametrize(
    "shape",
    [LOCAL, remote(3, "tcp"), remote(2, "grpc")],
    ids=["monolithic", "3-tcp", "2-grpc"],
)
def test_blocks_stay_bounded_while_windows_pass(shape: Shape, folder: Path, expected: list[int]) -> None:
    """Ten windows of tokens take as many blocks as a few, and the tokens are the reference's."""
    seen: list[int] = []
    with DenseCluster(folder, shape) as cluster:

        def look(output: Output) -> bool:
            if trimmed(output):
                seen.append(used_blocks(cluster))
            return False

        output = cluster.listener.wait(cluster.submit(request(PROMPT, COUNT)), look)
        assert output.token_ids == expected
        assert computed_tokens(cluster.engine) == len(PROMPT) + COUNT - 1
    assert len(seen) > COUNT - TRIMMED_AFTER - 20
    assert max(seen) <= BLOCKS_MOST
    firsts = [shard_map[0].first for shard_map in output.maps if shard_map]
    assert firsts == sorted(firsts)


@pytest.fixture(scope="module")
def mixed(folder: Path) -> dict[tuple[int, ...], Reference]:
    """What transformers says after prompts of several lengths, each prompt once."""
    prompts = [random_prompt(length, 7) for length in (9, 40, 90)]
    references = reference_tokens(folder, prompts, 120)
    return {tuple(prompt): each for prompt, each in zip(prompts, references, strict=True)}


def generate_mixed(cluster: DenseCluster, mixed: dict[tuple[int, ...], Reference]) -> list[Output]:
    """Each prompt twice in one batch; tokens are checked."""
    prompts = [prompt for prompt in mixed for _ in range(2)]
    outputs = cluster.generate(request(prompt, 120) for prompt in prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        sharp = mixed[prompt].sharp_length()
        assert output.token_ids[:sharp] == list(mixed[prompt].tokens[:sharp])
    return outputs


def test_a_batch_trims_each_sequence_by_its_own_length(
    folder: Path, mixed: dict[tuple[int, ...], Reference]
) -> None:
    """Sequences of several lengths, some with the same prompt and so with common blocks, in one batch."""
    with DenseCluster(folder, remote(2)) as cluster:
        outputs = generate_mixed(cluster, mixed)
    assert all(output.maps[-1][0].first > 0 for output in outputs)


def test_preempted_trimmed_sequences_begin_at_0(
    folder: Path, mixed: dict[tuple[int, ...], Reference]
) -> None:
    """In an arena that holds the longest sequence and little more, trimmed sequences preempt each other."""
    with DenseCluster(folder, replace(LOCAL, local_blocks=28)) as cluster:
        outputs = generate_mixed(cluster, mixed)
    assert sum(output.timings.preemptions for output in outputs if output.timings) > 0


@pytest.mark.parametrize("place", [0, -2, -1])
def test_a_killed_worker_changes_no_token(place: int, folder: Path, expected: list[int]) -> None:
    """Whichever shard of a trimmed sequence is lost, out of sight or a hole, the tokens are the same."""
    with DenseCluster(folder, remote(3)) as cluster:
        submission = started(cluster)
        cluster.kill_worker(cluster.listener.output(submission).maps[-1][place].worker)
        cluster.tell()
        output = cluster.listener.wait(submission)
        assert output.failure is None
        assert output.token_ids == expected


def test_a_hole_that_needs_what_expired_begins_at_0(folder: Path, expected: list[int]) -> None:
    """The worker with all that is left dies: its tokens depend on those that expired, so everything is
    computed again on the other one, and the stream goes on with the same tokens.
    """
    shape = Shape(attention_workers=2, worker_blocks=64, block_tokens=BLOCK_TOKENS, shard_tokens=400)
    with DenseCluster(folder, shape) as cluster:
        submission = started(cluster)
        (shard,) = cluster.listener.output(submission).maps[-1]
        cluster.kill_worker(shard.worker)
        cluster.tell()
        output = cluster.listener.wait(submission)
        assert output.token_ids == expected
        assert {kept.worker for kept in output.maps[-1]} == cluster.workers.keys()
        again = len(PROMPT) + TRIMMED_AFTER - 1
        assert computed_tokens(cluster.engine) >= len(PROMPT) + COUNT - 1 + again
        assert counted(cluster.engine, RECOMPUTED) >= len(PROMPT) + TRIMMED_AFTER


def test_the_loss_of_what_nobody_sees_costs_nothing(folder: Path, expected: list[int]) -> None:
    """A worker dies with what lies before the window and has not been given back yet: that is no hole."""
    with DenseCluster(folder, remote(5)) as cluster:
        submission = started(cluster)
        first, *others = cluster.listener.output(submission).maps[-1]
        assert first.end < len(PROMPT) + TRIMMED_AFTER - WINDOW
        assert first.worker not in {shard.worker for shard in others}
        cluster.kill_worker(first.worker)
        cluster.tell()
        assert cluster.listener.wait(submission).token_ids == expected
        assert computed_tokens(cluster.engine) == len(PROMPT) + COUNT - 1


@pytest.mark.parametrize("place", [0, -2])
def test_a_trimmed_sequence_moves(place: int, folder: Path, expected: list[int]) -> None:
    """A shard of a trimmed sequence moves between workers, and the sequence is trimmed on afterwards."""
    with DenseCluster(folder, remote(3)) as cluster:
        submission = started(cluster)
        shards = cluster.listener.output(submission).maps[-1]
        source = shards[place].worker
        target = next(worker for worker in cluster.workers if worker != source)
        cluster.engine.move(submission.key, source, target)
        output = cluster.listener.wait(submission)
        assert output.token_ids == expected
        assert counted(cluster.engine, "anabranch_dense_moves", outcome="done") == 1
        assert output.maps[-1][0].first > shards[-1].first


def resumed(submission: Submission, output: Output, tokens: Sequence[int]) -> Submission:
    """The same sequence as another dense worker gets it, with the tokens its gateway has."""
    return request(PROMPT, COUNT, key=submission.key, generation=2, output=tokens, shard_map=output.maps[-1])


@pytest.mark.parametrize(("behind", "recomputes"), [(0, False), (30, False), (TRIMMED_AFTER, True)])
def test_a_take_over_after_expiry(behind: int, recomputes: bool, folder: Path, expected: list[int]) -> None:
    """Another dense worker adopts a trimmed sequence: what has expired for it too is no hole. A gateway that
    is some tokens behind changes nothing; one so far behind that it needs what has expired begins at 0.
    """
    with DenseCluster(folder, remote(3)) as cluster:
        submission = started(cluster)
        cluster.engine.stop()
        output = cluster.listener.output(submission)
        tokens = list(output.token_ids)[: len(output.token_ids) - behind]
        cluster.engine = cluster.new_engine()
        cluster.attach(cluster.engine)
        again = cluster.submit(resumed(submission, output, tokens))
        assert cluster.listener.wait(again).token_ids == expected
        computed = computed_tokens(cluster.engine)
        if recomputes:
            assert computed >= len(PROMPT) + len(tokens)
        else:
            assert computed <= COUNT - len(tokens) + 2
