"""Both clients behind one function, so that a test's claim is checked for each."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from anabranch import AsyncClient, Client
from anabranch.events import Event, Finished, Started, TokenDelta
from tests.fake_gateway import PATIENCE_S, FakeGateway


@dataclass
class Reading:
    """What was read of a stream."""

    events: list[Event] = field(default_factory=list)
    resumes: int = 0

    def token_ids(self, choice: int = 0) -> list[int]:
        """Tokens of a choice, at the indices they were given."""
        tokens: list[int] = []
        for event in self.events:
            if isinstance(event, TokenDelta) and event.choice == choice:
                assert event.first_index == len(tokens)
                tokens += event.token_ids
        return tokens

    def text(self, choice: int = 0) -> str:
        """Text of a choice."""
        deltas = [event for event in self.events if isinstance(event, TokenDelta)]
        return "".join(event.text for event in deltas if event.choice == choice)

    @property
    def finished(self) -> list[Finished]:
        """The ends of the choices."""
        return [event for event in self.events if isinstance(event, Finished)]

    @property
    def started(self) -> list[Started]:
        """The beginnings; there should be one."""
        return [event for event in self.events if isinstance(event, Started)]


Read = Callable[..., Reading]
"""(addresses, prompt, connection=..., into=..., **options) -> what was read."""


def read(
    addresses: str | Sequence[str],
    prompt: str = "The river",
    *,
    connection: dict[str, Any] | None = None,
    into: Reading | None = None,
    **options: Any,
) -> Reading:
    """Read a whole stream with the synchronous client."""
    reading = into or Reading()
    with Client(addresses, **(connection or {})) as client, client.generate(prompt, **options) as stream:
        for event in stream:
            reading.events.append(event)
        reading.resumes = stream.resumes
    return reading


def read_async(
    addresses: str | Sequence[str],
    prompt: str = "The river",
    *,
    connection: dict[str, Any] | None = None,
    into: Reading | None = None,
    **options: Any,
) -> Reading:
    """Read a whole stream with the asyncio client."""
    reading = into or Reading()

    async def run() -> None:
        async with (
            AsyncClient(addresses, **(connection or {})) as client,
            client.generate(prompt, **options) as stream,
        ):
            async for event in stream:
                reading.events.append(event)
            reading.resumes = stream.resumes

    asyncio.run(run())
    return reading


@contextlib.contextmanager
def when_held(gateway: FakeGateway, action: Callable[[], object]) -> Iterator[None]:
    """Do something, beside the block, once the gateway holds a stream; the block outlives it."""

    def run() -> None:
        assert gateway.held.wait(PATIENCE_S)
        action()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        yield
        future.result(PATIENCE_S)
