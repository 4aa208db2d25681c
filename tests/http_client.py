"""An HTTP client of a gateway under test."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.fake_dense import FakeDense
from tests.gateways import Fleet, fleet

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@asynccontextmanager
async def served(
    folder: Path, worker: FakeDense, **sections: Any
) -> AsyncIterator[tuple[Fleet, httpx.AsyncClient]]:
    """A gateway with one dense worker, and an HTTP client of it."""
    async with (
        fleet(folder, [worker], **sections) as cluster,
        httpx.AsyncClient(base_url=cluster.http, timeout=20, trust_env=False) as client,
    ):
        yield cluster, client


async def stream_chunks(client: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in response.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
