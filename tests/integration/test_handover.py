"""Running sequences change their dense worker: the cache stays where it lies, and no token changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.v1 import dense_pb2, dense_pb2_grpc, inference_pb2, types_pb2
from anabranch.wire import sequence_message
from cluster import rpc
from cluster.errors import ConfigError, Fenced, InvalidRequest
from cluster.types import Epoch, SequenceKey, WorkerId
from tests.attention_pool import call
from tests.cluster_harness import DenseCluster, Output, Shape, computed_tokens, counted, request
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import Reader, whole
from workers.attention.kv_service import KvService
from workers.dense.deltas import FinishReason, Handoff
from workers.dense.engine import Engine

PROMPT = random_prompt(200, 1)
LONG = 120
TWO = Shape(attention_workers=2, shard_tokens=64)
ALONE = Shape(attention_workers=2, shard_tokens=64, overrides={"attention": {"prefix_sharing": False}})
"""Each request computes all of its prompt."""
OTHER = WorkerId("dense-1")


def some(output: Output) -> bool:
    """A few tokens came."""
    return len(output.token_ids) >= 5


def resumed(cluster: DenseCluster, engine: Engine, key: SequenceKey, output: Output) -> Output:
    """What another dense worker makes of a sequence that was handed over, as a gateway submits it."""
    again = request(PROMPT, LONG, key=key, generation=2, output=output.token_ids, shard_map=output.maps[-1])
    return cluster.listener.wait(cluster.submit(again, engine))


@pytest.fixture(name="copies")
def _copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that copy KV from one attention worker to another, from now on."""
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(KvService, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("Pull", "Fetch"):
        monkeypatch.setattr(KvService, name, noted(name))
    return calls


def lane_bytes(cluster: DenseCluster) -> int:
    """What all lanes carried so far, to and fro."""
    return sum(lane.bytes_sent + lane.bytes_received for lane in cluster.lanes)


def test_no_kv_moves_and_no_token_changes(folder: Path, copies: list[str]) -> None:
    """A sequence that is handed over while it decodes goes on elsewhere with the same tokens. The other
    worker computes what a step had under way and nothing of the prompt; no shard is copied, and lanes carry
    three steps more than without, at most: far less than the KV of the prompt.
    """
    with DenseCluster(folder, ALONE) as cluster:
        (expected,) = cluster.generate([request(PROMPT, LONG)])
        undisturbed = lane_bytes(cluster)
        spare = 3 * undisturbed / counted(cluster.engine, "anabranch_dense_steps")
        assert spare < len(PROMPT) * cluster.geometry.token_bytes / 2
        other = cluster.new_engine()
        cluster.attach(other)
        try:
            first = cluster.submit(request(PROMPT, LONG))
            cluster.listener.wait(first, some)
            answers: list[list[SequenceKey]] = []
            cluster.engine.hand_over([first.key, SequenceKey("unknown")], OTHER, answers.append)
            output = cluster.listener.wait(first)
            assert output.handoff == Handoff(worker_stays=True, target=OTHER)
            assert answers == [[first.key]]
            assert resumed(cluster, other, first.key, output).token_ids == expected.token_ids
            assert computed_tokens(other) <= LONG - len(output.token_ids) + 2
            assert lane_bytes(cluster) - undisturbed <= undisturbed + spare
            assert copies == []
            (again,) = cluster.generate([request(PROMPT, LONG)])
            assert again.token_ids == expected.token_ids
        finally:
            other.stop()


def test_a_worker_for_prompts_gives_sequences_away_with_their_prompt(folder: Path) -> None:
    """It keeps a sequence until its prompt is certain at the attention workers: the next one computes none of
    it. What comes back with tokens, because nobody decodes, it serves to the end.
    """
    with DenseCluster(folder, TWO) as cluster:
        (expected,) = cluster.generate([request(PROMPT, LONG)])
        prefill = cluster.new_engine("prefill")
        cluster.attach(prefill)
        try:
            output = cluster.listener.wait(first := cluster.submit(request(PROMPT, LONG), prefill))
            assert output.handoff == Handoff(worker_stays=True)
            assert len(output.token_ids) == 2
            before = computed_tokens(cluster.engine)
            assert resumed(cluster, cluster.engine, first.key, output).token_ids == expected.token_ids
            assert computed_tokens(cluster.engine) - before <= LONG - 2 + 2
            lost = cluster.listener.wait(second := cluster.submit(request(PROMPT, LONG), prefill))
            assert resumed(cluster, prefill, second.key, lost).token_ids == expected.token_ids
            (short,) = [cluster.listener.wait(cluster.submit(request(PROMPT, 1), prefill))]
            assert short.finish is FinishReason.LENGTH
        finally:
            prefill.stop()


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=True)


def _dense(cluster: ProcessCluster, worker_id: str) -> inference_pb2.Member:
    return next(member for member in cluster.members() if member.worker_id == worker_id)


def _hand_over(cluster: ProcessCluster, source: str, target: str, request_id: str, epoch: int = 0) -> int:
    """Ask one worker to hand a request to another; returns how many sequences left."""
    message = dense_pb2.HandoverRequest(
        believed=types_pb2.Believed(epoch=epoch),
        sequences=[sequence_message(SequenceKey(request_id))],
        target=target,
    )
    with rpc.channel(_dense(cluster, source).address, cluster.config.security.tls) as channel:
        return len(call(dense_pb2_grpc.DenseServiceStub(channel).Handover, message).sequences)


def test_a_stream_goes_on_through_hand_overs(model: Path, tmp_path: Path) -> None:
    """Through real processes: a stream is handed back and forth by `Handover` while it runs, and its client
    sees the reference's tokens. Who is asked wrongly refuses, and nothing happens.
    """
    prompt = random_prompt(60, 3)
    (expected,) = reference_tokens(model, [prompt], 400)
    overrides = {"dense.replicas": 2, "placement.shard_tokens": 32, "attention.block_tokens": 8}
    with process_cluster(model, tmp_path, overrides) as cluster, cluster.client() as client:
        reader = Reader(client, token_ids=prompt, temperature=0.0, max_tokens=400, ignore_eos=True)
        reader.wait_tokens(10)
        with pytest.raises(InvalidRequest, match="itself"):
            _hand_over(cluster, "dense-0", "dense-0", reader.request_id)
        with pytest.raises(Fenced):
            _hand_over(cluster, "dense-0", "dense-1", reader.request_id, Epoch(1))
        assert _hand_over(cluster, "dense-0", "dense-1", "nobody") == 0
        assert _hand_over(cluster, "dense-0", "dense-1", reader.request_id) == 1
        reader.wait_tokens(60)
        assert _hand_over(cluster, "dense-1", "dense-0", reader.request_id) == 1
        assert reader.result().token_ids() == list(expected.tokens)
        cluster.assert_nothing_leaks()


def test_prompts_and_decoding_on_workers_of_their_own(model: Path, tmp_path: Path) -> None:
    """`dense.serves: [prefill, decode]`: the reference's tokens, each worker doing its part."""
    prompts = [random_prompt(length, length) for length in (30, 90)]
    references = reference_tokens(model, prompts, 40)
    overrides = {"dense.replicas": 2, "dense.serves": ["prefill", "decode"]}
    with process_cluster(model, tmp_path, overrides) as cluster, cluster.client() as client:
        for prompt, expected in zip(prompts, references, strict=True):
            reading = whole(client, token_ids=prompt, temperature=0.0, max_tokens=40, ignore_eos=True)
            assert reading.token_ids() == list(expected.tokens)
        cluster.assert_nothing_leaks()
        assert cluster.log("dense-0").count('"handed_over"') == len(prompts)
        assert cluster.log("dense-1").count('"admitted"') == len(prompts)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"dense.serves": ["prefill"], "dense.replicas": 2}, "serves decode"),
        ({"dense.serves": ["decode"]}, "serves prefill"),
        (
            {"dense.serves": ["prefill", "both"], "dense.replicas": 2, "dense.local_arena": "1MiB"},
            "local_arena",
        ),
    ],
)
def test_a_cluster_in_which_nobody_could_finish_is_refused(
    model: Path, tmp_path: Path, overrides: dict[str, object], words: str
) -> None:
    """A configuration without somebody for each part, or whose cache nobody can take over, says so."""
    with pytest.raises(ConfigError, match=words), process_cluster(model, tmp_path, overrides):
        pass
