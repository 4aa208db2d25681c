"""The OpenAI-compatible API of a whole cluster whose queue and pool are small: answers, limits, metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from anabranch import Client
from anabranch.v1 import inference_pb2, types_pb2
from tests.models import random_prompt, tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import Reader, http_client, raw_channel, status_of, wait_until, whole

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

LONGEST = 4096
BLOCK_TOKENS = 8
POOL_TOKENS = 512
TOKEN_BYTES = 512
MAX_STREAMS = 8
MAX_BATCH = 4
MAX_WAITING = 8


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """One dense worker of `MAX_BATCH`, two attention workers that hold half of `POOL_TOKENS` each."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(folder, "llama", tokenizer=True, max_position_embeddings=LONGEST)
    overrides = {
        "gateway.http_port": 0,
        "gateway.max_streams": MAX_STREAMS,
        "attention.block_tokens": BLOCK_TOKENS,
        "attention.arena": POOL_TOKENS * TOKEN_BYTES // 2,
        "placement.shard_tokens": 64,
        "dense.max_batch": MAX_BATCH,
        "dense.max_waiting": MAX_WAITING,
        "dense.reserve_ahead_tokens": 8,
    }
    with process_cluster(model, tmp_path_factory.mktemp("run"), overrides) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: ProcessCluster, client: Client) -> Iterator[ProcessCluster]:
    """The cluster; after each test nothing is held and the next request is answered."""
    yield running
    running.assert_nothing_leaks()
    assert len(whole(client, token_ids=[1, 2, 3], max_tokens=4).token_ids()) == 4


@pytest.fixture(scope="module")
def client(running: ProcessCluster) -> Iterator[Client]:
    """The client library, connected."""
    with running.client() as client:
        yield client


@pytest.fixture(scope="module")
def http(running: ProcessCluster) -> Iterator[httpx.Client]:
    """An HTTP client of the gateway."""
    with http_client(running) as http:
        yield http


def _chunks(http: httpx.Client, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    with http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def _error(response: httpx.Response) -> dict[str, Any]:
    """The OpenAI error of a response."""
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


COMPLETION = {
    "model": "tiny",
    "prompt": "the tide in then",
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "the tide"}],
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}


def test_a_completion_and_its_stream(cluster: ProcessCluster, http: httpx.Client, client: Client) -> None:
    """Both say what gRPC says; usage adds up; n choices are numbered."""
    text = whole(client, prompt=COMPLETION["prompt"], max_tokens=12).text()
    answer = http.post("/v1/completions", json={**COMPLETION, "n": 2}).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, text), (1, text)]
    usage = answer["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24
    chunks = _chunks(http, "/v1/completions", {**COMPLETION, "stream_options": {"include_usage": True}})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == text
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_a_chat_and_its_stream(cluster: ProcessCluster, http: httpx.Client, client: Client) -> None:
    """The message, the deltas and gRPC's text are the same; seeded samples repeat over the two forms."""
    text = whole(client, messages=CHAT["messages"], max_tokens=12).text()
    message = http.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", text)
    sampled = {**CHAT, "temperature": 1.0, "seed": 5}
    once = http.post("/v1/chat/completions", json=sampled).json()["choices"][0]["message"]["content"]
    chunks = _chunks(http, "/v1/chat/completions", sampled)
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == once
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_stop_and_logprobs(cluster: ProcessCluster, http: httpx.Client) -> None:
    """A stop string cuts the text before it; log-probabilities come one per token, in both forms."""
    answer = http.post("/v1/completions", json={**COMPLETION, "logprobs": 3}).json()["choices"][0]
    assert len(answer["logprobs"]["token_logprobs"]) == 12
    assert all(value <= 0 for value in answer["logprobs"]["token_logprobs"])
    stop = answer["text"][4:7]
    cut = http.post("/v1/completions", json={**COMPLETION, "stop": stop}).json()["choices"][0]
    assert cut["text"] == answer["text"][: answer["text"].index(stop)]
    assert cut["finish_reason"] == "stop"
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    content = http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": ""}, 400, "empty"),
        ("/v1/completions", {**COMPLETION, "model": "gpt-9"}, 404, "gpt-9"),
        ("/v1/completions", {**COMPLETION, "temperature": 3}, 400, "temperature"),
        ("/v1/completions", {**COMPLETION, "max_tokens": LONGEST}, 400, "shorten"),
        ("/v1/completions", {**COMPLETION, "prompt": [1, 10_000]}, 400, "10000"),
        ("/v1/completions", {**COMPLETION, "prompt": [1.5]}, 400, "prompt"),
        ("/v1/completions", {**COMPLETION, "temprature": 1}, 400, "did you mean 'temperature'"),
        ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "no messages"),
        ("/v1/chat/completions", {**CHAT, "messages": "hello"}, 400, "messages"),
        ("/tokenize", {}, 400, "prompt or messages"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
    ids=str,
)
def test_errors_are_openais(
    cluster: ProcessCluster, http: httpx.Client, path: str, body: Mapping[str, Any], status: int, said: str
) -> None:
    """Each mistake has its status and OpenAI's JSON, and the message names it."""
    response = http.post(path, json=body)
    assert response.status_code == status
    assert said in _error(response)["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b'{"prompt": NaN}', b"[" * 5000], ids=str)
def test_bodies_that_are_no_json_object(cluster: ProcessCluster, http: httpx.Client, raw: bytes) -> None:
    """400 with OpenAI's JSON, whatever the bytes."""
    response = http.post("/v1/completions", content=raw)
    assert response.status_code == 400
    _error(response)


def test_the_small_endpoints(cluster: ProcessCluster, http: httpx.Client, client: Client) -> None:
    """/v1/models, /tokenize and /health."""
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
    answer = http.post("/tokenize", json={"prompt": "the tide"}).json()
    assert tuple(answer["tokens"]) == client.tokenize("the tide").token_ids
    assert answer["max_model_len"] == LONGEST
    assert http.get("/health").status_code == 200


def test_more_than_the_pool_holds_is_refused_at_admission(
    cluster: ProcessCluster, client: Client, http: httpx.Client
) -> None:
    """A prompt, or prompt and output, beyond the whole pool: RESOURCE_EXHAUSTED at once, never dropped."""
    for prompt, most in ((POOL_TOKENS + 100, 4), (POOL_TOKENS - 50, 100)):
        tokens = inference_pb2.TokenPrompt(token_ids=[1] * prompt)
        request = inference_pb2.GenerateRequest(
            tokens=tokens, sampling=types_pb2.SamplingParameters(max_tokens=most)
        )
        began_s = monotonic()
        with raw_channel(cluster) as channel:
            status, message = status_of(channel, request)
        assert status == "RESOURCE_EXHAUSTED"
        assert f"{prompt + most}" in message
        assert monotonic() - began_s < 1.0
    response = http.post("/v1/completions", json={**COMPLETION, "prompt": [1] * 2 * POOL_TOKENS})
    assert response.status_code == 429
    _error(response)
    assert len(whole(client, token_ids=[1] * (POOL_TOKENS - 50), max_tokens=40).token_ids()) == 40


def _occupy(client: Client, count: int, tokens: int) -> list[Reader]:
    """Requests that run or wait; those that can run have begun."""
    readers = [Reader(client, token_ids=[1, index], max_tokens=tokens) for index in range(count)]
    wait_until(lambda: sum(reader.has_begun for reader in readers) >= min(count, MAX_BATCH))
    return readers


def test_a_full_gateway_says_back_off(cluster: ProcessCluster, client: Client, http: httpx.Client) -> None:
    """Beyond gateway.max_streams: RESOURCE_EXHAUSTED, 429 with Retry-After; those open are all served."""
    readers = _occupy(client, MAX_STREAMS, tokens=160)
    wait_until(lambda: _gauge(http, "anabranch:streams_open") == MAX_STREAMS)
    refused = http.post("/v1/completions", json=COMPLETION)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert _error(refused)["type"] == "rate_limit_error"
    with raw_channel(cluster) as channel:
        assert status_of(channel, inference_pb2.GenerateRequest(text="the"))[0] == "RESOURCE_EXHAUSTED"
    assert [len(reader.result().token_ids()) for reader in readers] == [160] * len(readers)


def test_a_full_queue_says_back_off(cluster: ProcessCluster, client: Client) -> None:
    """Beyond dense.max_waiting: RESOURCE_EXHAUSTED with the limit's name; nothing is half served."""
    with raw_channel(cluster) as channel:
        request = inference_pb2.GenerateRequest(
            text="the", n=16, sampling=types_pb2.SamplingParameters(max_tokens=50, ignore_eos=True)
        )
        status, message = status_of(channel, request)
    assert status == "RESOURCE_EXHAUSTED"
    assert "dense.max_waiting" in message


def test_a_deadline_ends_a_queued_request(
    cluster: ProcessCluster, client: Client, http: httpx.Client
) -> None:
    """One that never ran ends with DEADLINE_EXCEEDED within half a second; those that run go on."""
    readers = _occupy(client, MAX_BATCH, tokens=110)
    began_s = monotonic()
    with raw_channel(cluster) as channel:
        request = inference_pb2.GenerateRequest(
            text="x", sampling=types_pb2.SamplingParameters(max_tokens=50, ignore_eos=True)
        )
        status, _ = status_of(channel, request, timeout_s=0.15)
    assert status == "DEADLINE_EXCEEDED"
    assert monotonic() - began_s < 0.65
    assert [len(reader.result().token_ids()) for reader in readers] == [110] * MAX_BATCH


def test_preemption_changes_no_token(cluster: ProcessCluster, client: Client, http: httpx.Client) -> None:
    """Four sequences of which two fit: some are preempted, and counted; all end as they do alone."""

    def run(seed: int) -> tuple[list[int], int]:
        reading = whole(client, token_ids=random_prompt(20, seed), max_tokens=POOL_TOKENS // 2 - 40)
        return reading.token_ids(), reading.finished[0].timings.preemptions

    alone = [run(seed)[0] for seed in range(4)]
    before = _samples(http)["vllm:num_preemptions_total", ""]
    with ThreadPoolExecutor(4) as executor:
        together = list(executor.map(run, range(4)))
    assert [tokens for tokens, _ in together] == alone
    preemptions = sum(count for _, count in together)
    assert preemptions >= 1
    assert _samples(http)["vllm:num_preemptions_total", ""] == before + preemptions


def _samples(http: httpx.Client) -> dict[tuple[str, str], float]:
    """(name, finished_reason or "") -> value."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, sample.labels.get("finished_reason", "")): sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def _gauge(http: httpx.Client, name: str) -> float:
    return _samples(http)[name, ""]


EXPECTED_METRICS = (
    "vllm:num_requests_running",
    "vllm:cache_config_info",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
    "vllm:request_prompt_tokens_count",
    "vllm:request_generation_tokens_count",
)


def test_metrics_count_what_was_served(cluster: ProcessCluster, http: httpx.Client) -> None:
    """vLLM's names, and values that one request moves by what it had."""
    before = _samples(http)
    usage = http.post("/v1/completions", json=COMPLETION).json()["usage"]
    after = _samples(http)
    assert [name for name in EXPECTED_METRICS if (name, "") not in after] == []

    def grown(name: str, reason: str = "") -> float:
        return after[name, reason] - before.get((name, reason), 0.0)

    assert grown("vllm:prompt_tokens_total") == usage["prompt_tokens"]
    assert grown("vllm:generation_tokens_total") == 12
    assert grown("vllm:request_success_total", "length") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert 0 < grown("vllm:time_to_first_token_seconds_sum") <= grown("vllm:e2e_request_latency_seconds_sum")
    assert grown("vllm:inter_token_latency_seconds_count") == 11
    assert 0 <= after["vllm:kv_cache_usage_perc", ""] <= 1


def test_hanging_up_on_http_frees_blocks(cluster: ProcessCluster, http: httpx.Client) -> None:
    """A connection closed in the middle of a stream frees its blocks within a second."""
    body = {**COMPLETION, "max_tokens": 400, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    cluster.assert_nothing_leaks(within_s=1.0)
