"""Whole clusters of role processes: any numbers of both sides, and what happens when one dies."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from anabranch import Client
from anabranch.answers import Member
from anabranch.events import Finished
from anabranch.v1 import inference_pb2
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster

NEAR_TIE = 1e-3
PROMPTS = [random_prompt(length, seed) for length, seed in ((1, 1), (17, 2), (90, 3))]
TOKENS = 24


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


@pytest.fixture(scope="session")
def references(model: Path) -> Sequence[Reference]:
    """What transformers says after each prompt."""
    return reference_tokens(model, PROMPTS, TOKENS)


def _assert_same(tokens: Sequence[int], reference: Reference) -> None:
    """Token for token up to the first near-tie."""
    for index, (token, expected, gap) in enumerate(
        zip(tokens, reference.tokens, reference.gaps, strict=True)
    ):
        if gap < NEAR_TIE:
            return
        assert token == expected, f"token {index}"


def _generate(client: Client, prompt: Sequence[int]) -> list[int]:
    stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    return [token for event in stream for token in getattr(event, "token_ids", ())]


MANY = [(1, 0), (1, 1), (1, 3), (1, 5), (2, 1)]
"""Shapes that are served where there is time for them; see the marker."""


@pytest.mark.parametrize(
    ("dense", "attention"),
    [(1, 2), (2, 3), *(pytest.param(*shape, marks=pytest.mark.system) for shape in MANY)],
    ids=str,
)
def test_any_numbers_of_both_sides_serve_the_same_tokens(
    model: Path, references: Sequence[Reference], tmp_path: Path, dense: int, attention: int
) -> None:
    """Clusters of every shape answer as transformers does, give every block back, and stop by themselves."""
    overrides = {
        "dense.replicas": dense,
        "attention.replicas": attention,
        "attention.block_tokens": 8,
        "placement.shard_tokens": 16,
        "dense.local_arena": "8MiB" if attention == 0 else 0,
    }
    with process_cluster(model, tmp_path, overrides) as cluster:
        with cluster.client() as client:
            for prompt, reference in zip(PROMPTS, references, strict=True):
                _assert_same(_generate(client, prompt), reference)
            accounts = [member.blocks for member in client.topology().members if member.blocks is not None]
            assert sum(account.capacity for account in accounts) > 0  # wherever the cache lies
        cluster.assert_nothing_leaks()


def _busy(client: Client, is_busy: Callable[[Member], bool]) -> str:
    """The worker that says it is busy; heartbeats tell with a delay."""
    end_s = time.monotonic() + 10
    while time.monotonic() < end_s:
        for member in client.topology().members:
            if is_busy(member):
                return member.worker_id
    raise AssertionError("nobody is busy")


def _kill_while_streaming(
    cluster: ProcessCluster, is_busy: Callable[[Member], bool], prompt: Sequence[int], tokens: int
) -> list[int]:
    """Kill the busy worker once some tokens have come; returns all tokens."""
    received: list[int] = []
    killed = ""
    with cluster.client() as client:
        stream = client.generate(token_ids=prompt, temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for event in stream:
            received += getattr(event, "token_ids", ())
            if len(received) >= 4 and not killed:
                killed = _busy(client, is_busy)
                cluster.kill(killed)
    assert killed
    return received


@pytest.mark.parametrize(
    ("role", "is_busy"),
    [
        (
            "attention",
            lambda member: member.blocks is not None and member.blocks.free < member.blocks.capacity,
        ),
        ("dense", lambda member: member.role == "dense" and member.sequences_running > 0),
        ("gateway", lambda member: member.streams_open > 0),
    ],
    ids=["attention", "dense", "gateway"],
)
def test_a_killed_process_changes_no_token(
    model: Path, tmp_path: Path, role: str, is_busy: Callable[[Member], bool]
) -> None:
    """SIGKILL in the middle of a stream, one of each role: no token wrong, repeated or missing; no leak."""
    tokens = 400
    prompt = random_prompt(70, seed=5)
    reference = reference_tokens(model, [prompt], tokens)[0]
    overrides = {f"{role}.replicas": 2, "attention.block_tokens": 8, "attention.lease_ms": 3000}
    overrides["gateway.port"] = 0
    with process_cluster(model, tmp_path, overrides) as cluster:
        received = _kill_while_streaming(cluster, is_busy, prompt, tokens)
        _assert_same(received, reference)
        cluster.assert_nothing_leaks(within_s=10)


def _cached(client: Client, prompt: Sequence[int]) -> int:
    """Tokens of a prompt that were found in the pool."""
    events = list(client.generate(token_ids=prompt, temperature=0.0, max_tokens=2, ignore_eos=True))
    return next(event.usage.cached_tokens for event in events if isinstance(event, Finished))


def test_a_new_dense_worker_finds_what_a_dead_one_computed(model: Path, tmp_path: Path) -> None:
    """Prefixes outlive the dense worker that computed them: its successor, which has seen nothing, hears from
    the controller where they lie.
    """
    overrides = {"attention.replicas": 2, "attention.block_tokens": 8, "placement.shard_tokens": 32}
    prompts = [random_prompt(90, seed) for seed in range(10, 16)]
    with process_cluster(model, tmp_path, overrides) as cluster, cluster.client() as client:
        for prompt in prompts:
            assert _cached(client, prompt) == 0
        cluster.assert_nothing_leaks()  # and so all of it lies there as a cache
        cluster.kill("dense-0")
        cluster.launch("dense", 0)
        process_id = cluster.processes["dense-0"].pid
        cluster.wait(
            lambda members: any(
                (member.process_id, member.state) == (process_id, inference_pb2.MEMBER_STATE_READY)
                for member in members
            )
        )
        # The controller has 50 ms to answer, which a busy machine may miss now and then.
        assert max(_cached(client, prompt) for prompt in prompts) == 88
