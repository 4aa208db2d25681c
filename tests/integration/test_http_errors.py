"""What the HTTP API refuses and with which status; hang-ups; errors inside a stream."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import errors
from tests.fake_dense import FakeDense, says
from tests.gateways import CONTEXT, asynchronous, eventually, fleet
from tests.http_client import CHAT, COMPLETIONS, HELLO, served, stream_chunks

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown field": (COMPLETIONS, {"prompt": "x", "temprature": 1}, "did you mean 'temperature'"),
    "range": (COMPLETIONS, {"prompt": "x", "temperature": 3}, "temperature is 3.0"),
    "type": (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}, "max_tokens: "),
    "negative": (COMPLETIONS, {"prompt": "x", "max_tokens": -1}, "max_tokens: "),
    "huge seed": (COMPLETIONS, {"prompt": "x", "seed": 2**64}, "seed: "),
    "no prompt": (COMPLETIONS, {}, "prompt: Field required"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt is empty"),
    "empty list": (COMPLETIONS, {"prompt": []}, "prompt is empty"),
    "mixed list": (COMPLETIONS, {"prompt": ["x", 3]}, "prompt"),
    "token": (COMPLETIONS, {"prompt": [99999]}, "outside the vocabulary"),
    "too long": (COMPLETIONS, {"prompt": [1] * CONTEXT}, "shorten it"),
    "echo": (COMPLETIONS, {"prompt": "x", "echo": True}, "echo is not supported"),
    "best_of": (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of is not supported"),
    "options": (COMPLETIONS, {"prompt": "x", "stream_options": {}}, "stream_options without stream"),
    "no messages": (CHAT, {"messages": []}, "no messages"),
    "role": (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "'wizard'"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "has no content"),
    "tools": (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools is not supported"),
    "top_logprobs": (CHAT, {"messages": HELLO, "top_logprobs": 2}, "needs logprobs"),
    "half a character": (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, ""),
}


@asynchronous
async def test_bad_bodies_get_400_and_say_why(tmp_path: Path) -> None:
    """OpenAI's error JSON with a message that names the field; streaming or not; nothing is submitted."""
    worker = FakeDense("dense-0", says("x"))
    async with served(tmp_path, worker) as (cluster, client):
        for name, (path, body, words) in BAD.items():
            for stream in (False, True) if "stream_options" not in body else (False,):
                content = json.dumps(body | {"stream": stream})
                response = await client.post(path, content=content)
                assert response.status_code == 400, (name, response.text)
                error = response.json()["error"]
                assert words in error["message"], name
                assert error["type"] == "invalid_request_error"
        for content in ("{", "[]", "\xff", '{"prompt": NaN}'):
            assert (await client.post(COMPLETIONS, content=content.encode("latin-1"))).status_code == 400
        parameter = await client.post(COMPLETIONS, json={"prompt": "x", "top_p": 7})
        assert parameter.json()["error"]["param"] == "top_p"
        assert cluster.gateways[0].desk.streams_open == 0
    assert worker.submissions == []


@asynchronous
async def test_one_bad_prompt_refuses_all(tmp_path: Path) -> None:
    """Of several prompts either all are served or none: those begun are aborted."""
    worker = FakeDense("dense-0", pause_at=1)
    async with served(tmp_path, worker) as (cluster, client):
        response = await client.post(COMPLETIONS, json={"prompt": ["x", "", "y"]})
        assert response.status_code == 400
        assert cluster.gateways[0].desk.streams_open == 0
        await eventually(lambda: len(worker.aborts) == len(worker.submissions) == 1, "the first is aborted")


@asynchronous
async def test_other_errors_have_their_status(tmp_path: Path) -> None:
    """404 for models and paths, 405, 409, 413, 429 with Retry-After, 503 while draining."""
    worker = FakeDense("dense-0", pause_at=1)
    limits = {"max_streams": 2, "max_request_bytes": 2000}
    async with served(tmp_path, worker, gateway=limits) as (cluster, client):

        async def status(path: str, **body: Any) -> int:
            response = await client.post(path, json=body)
            assert response.json()["error"]["message"]
            return response.status_code

        assert await status(COMPLETIONS, prompt="x", model="other") == 404
        assert await status("/v1/nothing") == 404
        assert (await client.get(COMPLETIONS)).status_code == 405
        assert await status(COMPLETIONS, prompt="x" * 3000) == 413
        body = {"prompt": "x", "stream": True, "request_id": "mine"}
        waiting = [asyncio.create_task(client.post(COMPLETIONS, json=body))]
        await eventually(lambda: len(worker.submissions) == 1, "open")
        assert await status(COMPLETIONS, prompt="x", request_id="mine") == 409
        waiting.append(asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"})))
        await eventually(lambda: len(worker.submissions) == 2, "open")
        full = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        worker.pause_at = None
        await asyncio.gather(*waiting)
        cluster.gateways[0].desk.draining = True
        assert await status(COMPLETIONS, prompt="x") == 503
        assert (await client.get("/health")).status_code == 503


@asynchronous
async def test_a_worker_s_refusal_becomes_a_status_not_a_stream(tmp_path: Path) -> None:
    """Before the first token even a streaming request fails with its status."""
    worker = FakeDense("dense-0", refusal=errors.ResourceExhausted("queue full"))
    async with served(tmp_path, worker) as (_, client):
        response = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True})
    assert response.status_code == 429
    assert response.json()["error"]["message"] == "queue full"


@asynchronous
async def test_an_error_inside_a_stream_is_told(tmp_path: Path) -> None:
    """After the first token an error is the last event before [DONE]."""
    worker = FakeDense("dense-0", pause_at=3)
    async with served(tmp_path, worker, gateway={"default_deadline_ms": 500}) as (_, client):
        chunks = await stream_chunks(client, COMPLETIONS, prompt="x")
    assert chunks[0]["choices"][0]["text"]
    assert chunks[-1]["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first_token", [False, True])
@asynchronous
async def test_hanging_up_aborts(tmp_path: Path, stream: bool, first_token: bool) -> None:
    """A client that closes its connection aborts its sequences, before and after the first token."""
    worker = FakeDense("dense-0", pause_at=3 if first_token else 0)
    async with served(tmp_path, worker) as (cluster, client):
        body = {"prompt": ["x", "y"], "stream": stream}
        call = asyncio.create_task(client.post(COMPLETIONS, json=body))
        await eventually(lambda: len(worker.submissions) == 2, "submitted")
        call.cancel()
        await eventually(lambda: len(worker.aborts) == 2, "both are aborted")
        assert cluster.gateways[0].desk.streams_open == 0


@asynchronous
async def test_api_keys_over_http(tmp_path: Path) -> None:
    """401 without a known key, 403 beyond its limits, OpenAI's header otherwise; probes need none."""
    keys = tmp_path / "keys.yaml"
    keys.write_text("key-one: {tenant: one, max_tokens: 5}\n")
    security = {"api_keys_file": str(keys)}
    async with served(tmp_path, FakeDense("dense-0", says("x")), security=security) as (_, client):
        body = {"prompt": "hello"}
        for headers in ({}, {"authorization": "Bearer other"}):
            response = await client.post(COMPLETIONS, json=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "unauthenticated"
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        headers = {"authorization": "Bearer key-one"}
        assert (await client.post(COMPLETIONS, json=body, headers=headers)).status_code == 200
        body = {"prompt": "hello", "max_tokens": "6"}
        assert (await client.post(COMPLETIONS, json=body, headers=headers)).status_code == 403
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200


@asynchronous
async def test_a_taken_port_is_said(tmp_path: Path) -> None:
    """A gateway whose HTTP port is in use fails at start with the port's number."""
    async with fleet(tmp_path) as cluster:
        taken = cluster.gateways[0].http_port
        config = cluster.config.model_copy(
            update={"gateway": cluster.config.gateway.model_copy(update={"http_port": taken})}
        )
        cluster.config = config
        with pytest.raises(errors.Unavailable, match=f"{taken}: is the port in use"):
            await cluster.add_gateway()
