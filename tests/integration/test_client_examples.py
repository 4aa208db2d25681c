"""The examples in the client's documentation, run."""

import asyncio
import contextlib
import doctest
from collections.abc import Coroutine, Iterator
from types import ModuleType
from typing import Any

import pytest

import anabranch.async_client
import anabranch.async_stream
import anabranch.client
import anabranch.stream
from anabranch import AsyncClient, Client
from tests.fake_gateway import FakeGateway

ADDRESS_IN_EXAMPLES = "127.0.0.1:8650"


@contextlib.contextmanager
def _synchronous(address: str) -> Iterator[dict[str, Any]]:
    with Client(address) as client:
        yield {"client": client}


@contextlib.contextmanager
def _asynchronous(address: str) -> Iterator[dict[str, Any]]:
    with asyncio.Runner() as runner:

        async def connect() -> AsyncClient:
            return AsyncClient(address)

        client = runner.run(connect())

        def run(coroutine: Coroutine[Any, Any, object]) -> object:
            return runner.run(coroutine)

        yield {"client": client, "run": run, "asyncio": asyncio}
        runner.run(client.close())


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (anabranch.client, _synchronous),
        (anabranch.stream, _synchronous),
        (anabranch.async_client, _asynchronous),
        (anabranch.async_stream, _asynchronous),
    ],
    ids=lambda value: value.__name__,
)
def test_examples_print_what_they_say(
    module: ModuleType, names: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every example of a docstring prints what stands below it."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with FakeGateway() as gateway, names(gateway.address) as globals_:
        for test in doctest.DocTestFinder().find(module, extraglobs=globals_):
            for example in test.examples:
                example.source = example.source.replace(ADDRESS_IN_EXAMPLES, gateway.address)
            runner.run(test)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries > 0
