"""The OpenAI-compatible HTTP API over real sockets: fields, answers and streams."""

import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.certificates import authority
from tests.fake_dense import FakeDense, says
from tests.gateways import CONTEXT, SEED, TOKENIZER, asynchronous, expected_letters, fleet
from tests.http_client import CHAT, COMPLETIONS, HELLO, served, stream_chunks


@asynchronous
async def test_a_completion_and_its_stream_say_the_same(tmp_path: Path) -> None:
    """Text, finish reason and usage of a whole answer; the same text in chunks."""
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "seed": SEED}
    async with served(tmp_path, FakeDense("dense-0")) as (_, client):
        response = await client.post(COMPLETIONS, json=body)
        chunks = await stream_chunks(client, COMPLETIONS, **body)
    answer, expected = response.json(), TOKENIZER.decode(expected_letters())
    assert response.status_code == 200
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "text": expected,
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 20,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert all(chunk["usage"] is None for chunk in chunks)


@asynchronous
async def test_a_chat_and_its_stream_say_the_same(tmp_path: Path) -> None:
    """The message of a whole answer; a role first, then content, then the reason in a stream."""
    body = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 30}
    async with served(tmp_path, FakeDense("dense-0", says("Good day."))) as (_, client):
        answer = (await client.post(CHAT, json=body)).json()
        chunks = await stream_chunks(client, CHAT, **body)
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Good day.", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Good day."
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@asynchronous
async def test_every_sampling_field_reaches_the_worker(tmp_path: Path) -> None:
    """What a client sets is what is submitted, under both names of max_tokens."""
    worker = FakeDense("dense-0", says("x"))
    body = {
        "prompt": "hello",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.75,
        "logit_bias": {"5": -3.5},
        "seed": -1,
        "stop_token_ids": [4],
        "ignore_eos": True,
        "logprobs": 2,
        "priority": -4,
        "user": "somebody",
        "echo": False,
        "best_of": 1,
        "suffix": None,
    }
    async with served(tmp_path, worker) as (_, client):
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200
        chat = {"messages": HELLO, "max_tokens": 3, "max_completion_tokens": 4, "top_k": -1, "logprobs": True}
        assert (await client.post(CHAT, json=chat)).status_code == 200
    first, second = worker.submissions
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.25, 7, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.5, -1.0)
    assert (sampling.frequency_penalty, dict(sampling.logit_bias)) == (0.75, {5: -3.5})
    assert (sampling.seed, list(sampling.stop_token_ids), sampling.ignore_eos) == (2**64 - 1, [4], True)
    assert (sampling.logprobs, first.priority) == (2, -4)
    assert (second.sampling.max_tokens, second.sampling.top_k, second.sampling.logprobs) == (4, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hello", ["hello"]),
        (["hello", "there"], ["hello", "there"]),
        (TOKENIZER.encode("hello").ids, ["hello"]),
        ([TOKENIZER.encode("hello").ids, TOKENIZER.encode("there").ids], ["hello", "there"]),
    ],
    ids=["text", "texts", "tokens", "token lists"],
)
@asynchronous
async def test_prompts_come_in_four_shapes(tmp_path: Path, prompt: Any, prompts: list[str]) -> None:
    """A text, texts, token ids, lists of token ids; n choices of each prompt, in order."""
    body = {"prompt": prompt, "max_tokens": 20, "seed": SEED, "n": 2}
    expected = [
        TOKENIZER.decode(expected_letters(text, choice=choice)) for text in prompts for choice in (0, 1)
    ]
    async with served(tmp_path, FakeDense("dense-0")) as (_, client):
        answer = (await client.post(COMPLETIONS, json=body)).json()
        chunks = await stream_chunks(client, COMPLETIONS, stream_options={"include_usage": True}, **body)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["completion_tokens"] == 20 * len(expected)
    assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(text).ids) for text in prompts)
    texts = [""] * len(expected)
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]


@asynchronous
async def test_usage_in_every_chunk(tmp_path: Path) -> None:
    """continuous_usage_stats counts up; include_usage alone reports at the end only."""
    body = {"prompt": "hello", "max_tokens": 5}
    everywhere = {"include_usage": True, "continuous_usage_stats": True}
    async with served(tmp_path, FakeDense("dense-0")) as (_, client):
        chunks = await stream_chunks(client, COMPLETIONS, stream_options=everywhere, **body)
        at_the_end = await stream_chunks(client, COMPLETIONS, stream_options={"include_usage": True}, **body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 5)
    assert [chunk["usage"] for chunk in at_the_end[:-1]] == [None] * (len(at_the_end) - 1)


@asynchronous
async def test_stop_strings_and_their_reason(tmp_path: Path) -> None:
    """One stop or several; the one that matched is told, and shown where asked."""
    async with served(tmp_path, FakeDense("dense-0", says("one two three"))) as (_, client):
        body: dict[str, Any] = {"prompt": "hello", "stop": " thr"}
        one = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
        body = {"prompt": "hello", "stop": ["zzz", "two"], "include_stop_str_in_output": True}
        several = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert (one["text"], one["finish_reason"], one["stop_reason"]) == ("one two", "stop", " thr")
    assert (several["text"], several["stop_reason"]) == ("one two", "two")


@asynchronous
async def test_logprobs_in_both_shapes(tmp_path: Path) -> None:
    """Tokens, their log-probabilities and alternatives as each API writes them."""
    async with served(tmp_path, FakeDense("dense-0", says("ab"))) as (_, client):
        body: dict[str, Any] = {"prompt": "hello", "logprobs": 1}
        plain = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]["logprobs"]
        body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
        chat = (await client.post(CHAT, json=body)).json()["choices"][0]["logprobs"]
    assert plain == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }
    alternative = {"token": "a", "logprob": -0.5, "bytes": [97]}
    assert chat["content"][0] == alternative | {"top_logprobs": [alternative]}
    assert [entry["token"] for entry in chat["content"]] == ["a", "b"]


@asynchronous
async def test_chat_content_as_parts(tmp_path: Path) -> None:
    """Text parts are joined; developer is system; what is no text is refused as such."""
    worker = FakeDense("dense-0", says("x"))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with served(tmp_path, worker) as (_, client):
        messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
        assert (await client.post(CHAT, json={"messages": messages})).status_code == 200
        image = [{"type": "image_url", "image_url": {"url": "x"}}]
        refused = await client.post(CHAT, json={"messages": [{"role": "user", "content": image}]})
    prompt = TOKENIZER.decode(list(worker.submissions[0].prompt_token_ids), skip_special_tokens=False)
    assert "system\nBe kind." in prompt
    assert "user\none\ntwo" in prompt
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert message == "messages.0.content: only text parts are supported, not 'image_url'"


@asynchronous
async def test_models_tokenize_health_and_metrics(tmp_path: Path) -> None:
    """The small endpoints answer what clients and dashboards expect."""
    async with served(tmp_path, FakeDense("dense-0", says("x"))) as (_, client):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
        assert (await client.get("/v1/models/tiny")).json() == model
        assert (await client.get("/v1/models/other")).status_code == 404
        tokens = (await client.post("/tokenize", json={"prompt": "hello"})).json()
        assert tokens == {"count": 5, "max_model_len": CONTEXT, "tokens": TOKENIZER.encode("hello").ids}
        chat = (await client.post("/tokenize", json={"messages": HELLO})).json()
        assert chat["count"] == len(chat["tokens"]) > 5
        assert (await client.post("/tokenize", json={})).status_code == 400
        assert (await client.get("/health")).status_code == 200
        await client.post(COMPLETIONS, json={"prompt": "hello"})
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert 'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0' in metrics.text
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics.text


@asynchronous
async def test_https(tmp_path: Path) -> None:
    """With certificates configured the API is served over TLS, and over TLS only."""
    tls = authority(tmp_path).tls("server")
    async with fleet(tmp_path, security={"tls": tls.model_dump()}) as cluster:
        address = cluster.http.replace("http://127.0.0.1", "https://localhost")
        context = ssl.create_default_context(cafile=tls.authority)
        async with httpx.AsyncClient(verify=context, trust_env=False) as client:
            assert (await client.get(f"{address}/v1/models")).status_code == 200
            with pytest.raises(httpx.HTTPError):
                await client.get(f"{cluster.http}/v1/models")
