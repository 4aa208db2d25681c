"""Workers of each role that leave by `anabranch drain` while streams are open.

By themselves processes would leave at once here (`controller.drain_grace_s` is 0): what they wait for is the
time that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from anabranch.cli.control import Control
from anabranch.v1 import inference_pb2
from tests.http_client import COMPLETIONS
from tests.models import Reference, random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import http_client
from tests.tiers import Stream, metrics

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

GRACE_S = 60.0
PROMPT = random_prompt(100, seed=52)
COUNT = 900
"""On a fast machine a second's work, several times what it takes until a heartbeat tells of it."""
BLOCK_TOKENS = 8


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=1024)


@pytest.fixture(name="expected", scope="module")
def _expected(model: Path) -> Reference:
    """What transformers says, whoever leaves."""
    (reference,) = reference_tokens(model, [PROMPT], COUNT)
    assert reference.sharp_length() >= COUNT // 2, "take another seed: a near-tie ends the comparison"
    return reference


@pytest.fixture(name="cluster")
def _cluster(model: Path, tmp_path: Path) -> Iterator[ProcessCluster]:
    """Two of each role."""
    overrides = {
        "controller.drain_grace_s": 0,
        "controller.expiry_ms": 2500,
        "controller.heartbeat_ms": 100,
        "gateway.replicas": 2,
        "gateway.http_port": 0,
        "dense.replicas": 2,
        "attention.replicas": 2,
        "attention.block_tokens": BLOCK_TOKENS,
        "telemetry.metrics_port": 0,
    }
    with process_cluster(model, tmp_path, overrides) as cluster:
        yield cluster
        cluster.assert_nothing_leaks()


@pytest.mark.parametrize("role", ["attention", "dense"])
def test_a_worker_that_drains_cuts_no_stream(cluster: ProcessCluster, expected: Reference, role: str) -> None:
    """The one that works for the stream leaves: the tokens are the reference's, and none of what was computed
    is computed again.
    """
    with cluster.client() as client:
        stream = Stream(client, PROMPT, COUNT)
        stream.read(4)
        _drain(cluster, _busy(cluster, role))
        stream.assert_ends_as(expected)
    left = [member.worker_id for member in cluster.members() if member.role == inference_pb2.ROLE_DENSE]
    for worker in left:
        assert "anabranch_dense_tokens_lost_total 0.0" in metrics(cluster, worker)


def test_a_gateway_that_drains_finishes_what_cannot_resume(cluster: ProcessCluster) -> None:
    """An HTTP client reads its answer to the end, the same that another gateway gives."""
    body = {"prompt": PROMPT, "max_tokens": COUNT, "temperature": 0.0, "ignore_eos": True, "stream": True}
    with http_client(cluster, "gateway-0") as http, http.stream("POST", COMPLETIONS, json=body) as answer:
        lines = answer.iter_lines()
        begun = next(lines)
        _drain(cluster, "gateway-0")
        text = _text([begun, *lines])
    with http_client(cluster, "gateway-1") as http:
        assert text == _text(http.post(COMPLETIONS, json=body).text.splitlines())


def _drain(cluster: ProcessCluster, worker: str) -> None:
    """As the command does; returns when the worker is gone."""
    process = cluster.processes.pop(worker)
    with Control.open(cluster.controller, None) as control:
        control.drain(worker, GRACE_S)
    assert process.wait(GRACE_S) == 0


def _busy(cluster: ProcessCluster, role: str) -> str:
    """The worker of a role that has the one sequence there is; heartbeats tell with a delay."""

    def loads() -> list[str]:
        return [
            member.worker_id
            for member in cluster.members()
            if member.worker_id.startswith(role)
            and (member.load.sequences_running or member.load.blocks.sealed_referenced)
        ]

    cluster.wait(lambda _members: bool(loads()))
    (worker,) = loads()
    return worker


def _text(lines: Sequence[str]) -> str:
    """The text of a stream that ended well."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]", data[-1]
    return "".join(json.loads(line)["choices"][0]["text"] for line in data[:-1])
