"""Sequences with a common prefix share its blocks in a real pool, and give the same tokens as without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.types import SequenceKey
from tests.cluster_harness import DenseCluster, Output, Shape, assert_continues, counted, request
from tests.models import Reference, random_prompt, reference_tokens
from workers.dense.sequences import Submission

PROMPT = random_prompt(75, 1)
COUNT = 20
SHAPES = {
    "one": Shape(attention_workers=1),
    "three": Shape(attention_workers=3),
    "local": Shape(local_blocks=256),
    "blocks of seven": Shape(attention_workers=2, block_tokens=7),
    "one token a block": Shape(attention_workers=2, block_tokens=1),
}
SHARED_HITS = "anabranch_dense_prefix_hits"


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    """What transformers says after `PROMPT`."""
    (found,) = reference_tokens(folder, [PROMPT], COUNT)
    return found


def assert_all_continue(outputs: Sequence[Output], reference: Reference) -> None:
    """Each output is the reference's up to its first near-tie."""
    for output in outputs:
        assert_continues(output, reference)


def choices(count: int, prompt: Sequence[int] = PROMPT, max_tokens: int = COUNT) -> list[Submission]:
    """The choices of one request."""
    name = request(prompt).key.request_id
    return [request(prompt, max_tokens, key=SequenceKey(name, choice)) for choice in range(count)]


def blocks_in_use(cluster: DenseCluster) -> int:
    """Blocks of all arenas that some sequence refers to."""
    return sum(capacity - available for available, capacity in cluster.free_blocks().values())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_choices_of_a_request_share_their_prompt(
    shape: Shape, folder: Path, reference: Reference
) -> None:
    """Four choices compute the prompt once: the others find all of it but the last token, and every choice
    gives the reference's tokens.
    """
    with DenseCluster(folder, shape) as cluster:
        outputs = cluster.generate(choices(4))
        assert_all_continue(outputs, reference)
        assert [output.cached_tokens for output in outputs] == [0, *[len(PROMPT) - 1] * 3]
        assert counted(cluster.engine, SHARED_HITS) == 3 * (len(PROMPT) - 1)


def test_the_choices_of_a_request_hold_its_prompt_once(folder: Path) -> None:
    """While eight choices decode, the pool holds one copy of their prompt's blocks and a tail for each."""
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        cluster.listener.acknowledges = False
        submitted = choices(8, max_tokens=10)
        outputs = cluster.generate(submitted)
        assert all(len(output.token_ids) == 10 for output in outputs)
        sealed, tail = len(PROMPT) // 16, 2
        assert blocks_in_use(cluster) <= sealed + 8 * tail
        for submission in submitted:
            cluster.engine.acknowledge(submission.key, submission.generation, 1.0)
        cluster.wait_all_free()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_any_prompt_length_shares_what_it_can(length: int, folder: Path) -> None:
    """At the edges of blocks too, all of a prompt but its last token is found."""
    prompt = random_prompt(length, 3)
    (reference,) = reference_tokens(folder, [prompt], COUNT)
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        outputs = cluster.generate(choices(3, prompt))
        assert_all_continue(outputs, reference)
        assert [output.cached_tokens for output in outputs] == [0, length - 1, length - 1]


def test_sampled_choices_differ_and_do_not_depend_on_sharing(folder: Path) -> None:
    """With a temperature the choices differ from each other, and each is what it is without sharing."""
    sampling: dict[str, Any] = {"temperature": 1.5, "seed": 7}

    def generate(shape: Shape) -> list[list[int]]:
        name = request(PROMPT).key.request_id
        with DenseCluster(folder, shape) as cluster:
            outputs = cluster.generate(
                request(PROMPT, COUNT, key=SequenceKey(name, choice), **sampling) for choice in range(4)
            )
        return [output.token_ids for output in outputs]

    shape = Shape(attention_workers=2)
    alone = replace(shape, overrides={"attention": {"prefix_sharing": False}})
    shared = generate(shape)
    assert len({tuple(tokens) for tokens in shared}) == 4
    assert shared == generate(alone)


def test_a_later_request_finds_what_an_earlier_one_left(folder: Path, reference: Reference) -> None:
    """After a request has ended and its blocks were released, one with the same prompt finds the whole
    blocks of it; one that goes on from its answer finds prompt and answer.
    """
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        (first,) = cluster.generate([request(PROMPT, COUNT)])
        cluster.wait_all_free()
        (again,) = cluster.generate([request(PROMPT, COUNT)])
        assert_all_continue([first, again], reference)
        assert again.cached_tokens == 64
        cluster.wait_all_free()
        (onward,) = cluster.generate([request([*PROMPT, *first.token_ids, 3], 2)])
        assert onward.cached_tokens == 80


@pytest.mark.parametrize(
    "shape", [SHAPES["one"], SHAPES["three"], SHAPES["local"]], ids=["one", "three", "local"]
)
def test_what_the_last_step_computed_is_found_too(shape: Shape, folder: Path, reference: Reference) -> None:
    """A prompt computed in one step, for one token, warms the prefix for the next: its whole blocks are
    found. And so is the last block of an answer, which its last step completed.
    """
    long = replace(shape, step_tokens=128)
    with DenseCluster(folder, long) as cluster:
        outputs = []
        for _ in range(2):
            outputs += cluster.generate([request(PROMPT, 1)])
            cluster.wait_all_free()
        assert [output.cached_tokens for output in outputs] == [0, 64]
        assert [output.token_ids[0] for output in outputs] == [reference.tokens[0]] * 2
        (answer,) = cluster.generate([request(PROMPT, 96 - len(PROMPT) + 1)])
        cluster.wait_all_free()
        (onward,) = cluster.generate([request([*PROMPT, *answer.token_ids, 3], 2)])
        assert onward.cached_tokens == 96


def test_a_prompt_found_whole_is_computed_from_its_last_token_on(folder: Path) -> None:
    """A hit covers at most floor((P - 1) / block) blocks: of four whole blocks three are found."""
    prompt = random_prompt(64, 5)
    (reference,) = reference_tokens(folder, [prompt], COUNT)
    with DenseCluster(folder, Shape(attention_workers=1)) as cluster:
        outputs = cluster.generate([request(prompt, COUNT)])
        cluster.wait_all_free()  # while it lives, its last block would be copied in part
        outputs += cluster.generate([request(prompt, COUNT)])
        assert_all_continue(outputs, reference)
        assert outputs[1].cached_tokens == 48


def test_a_full_pool_gives_up_what_nobody_uses(folder: Path) -> None:
    """Cached blocks keep no request out: prompts that fill the pool several times over are all served."""
    shape = Shape(attention_workers=2, worker_blocks=6)
    prompts = [random_prompt(75, seed) for seed in range(6)]
    references = reference_tokens(folder, prompts, COUNT)
    with DenseCluster(folder, shape) as cluster:
        for prompt, reference in zip(prompts, references, strict=True):
            assert_all_continue(cluster.generate([request(prompt, COUNT)]), reference)


def test_tenants_share_nothing(folder: Path) -> None:
    """The same prompt under another tenant finds nothing."""
    with DenseCluster(folder, Shape(attention_workers=2)) as cluster:
        cluster.generate([request(PROMPT, 4)])
        (other,) = cluster.generate([replace(request(PROMPT, 4), tenant="other")])
        assert other.cached_tokens == 0
        (same,) = cluster.generate([request(PROMPT, 4)])
        assert same.cached_tokens == 64


def test_a_lost_worker_costs_sharers_no_token(folder: Path, reference: Reference) -> None:
    """The worker that holds the common prefix dies while four choices decode: each recomputes and goes on."""
    with DenseCluster(folder, Shape(attention_workers=3)) as cluster:
        submitted = [cluster.submit(submission) for submission in choices(4)]
        for submission in submitted:
            cluster.listener.wait(submission, lambda output: len(output.token_ids) >= 3)
        first = cluster.listener.output(submitted[0]).maps[-1][0].worker
        cluster.kill_worker(first)
        cluster.tell()
        outputs = [cluster.listener.wait(submission) for submission in submitted]
        assert_all_continue(outputs, reference)


def test_an_aborted_first_choice_lets_the_others_go_on(folder: Path, reference: Reference) -> None:
    """The choice whose prompt the others wait for is aborted at once: they compute it themselves."""
    with DenseCluster(folder, Shape(attention_workers=2, step_tokens=16)) as cluster:
        leader, *others = [cluster.submit(submission) for submission in choices(3)]
        cluster.engine.abort(leader.key, leader.generation, 1.0)
        assert_all_continue([cluster.listener.wait(submission) for submission in others], reference)
