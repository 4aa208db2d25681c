"""Clients that are given one name for several gateways, over real sockets; a test says what the name stands
for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from anabranch import AsyncClient, Client
from anabranch.answers import Health
from cluster import errors
from cluster.config import SecurityConfig, TlsConfig
from tests.certificates import authority
from tests.client_reading import Reading, when_held
from tests.fake_gateway import FakeGateway, Script, text, tokens

NAME = "dns:///gateways.test:8650"


class Names:
    """Which gateways the name stands for now."""

    def __init__(self, *gateways: FakeGateway) -> None:
        self.gateways = list(gateways)

    def resolve(self, name: str, port: int) -> list[str]:
        """See `anabranch.addresses.Resolve`."""
        assert (name, port) == ("gateways.test", 8650)
        if not self.gateways:
            raise OSError("no such name")
        return [f"127.0.0.1:{gateway.port}" for gateway in self.gateways]


@contextlib.contextmanager
def _two(script: Script | None = None) -> Iterator[tuple[FakeGateway, FakeGateway]]:
    with FakeGateway(script) as first, FakeGateway(script) as second:
        yield first, second


def _asked(*gateways: FakeGateway) -> list[int]:
    return [len(gateway.requests) for gateway in gateways]


def test_two_gateways_share_the_streams_of_a_client() -> None:
    """From its first stream on, in both clients, also where all begin at once."""

    async def run(names: Names) -> None:
        async with AsyncClient(NAME, resolve=names.resolve) as client, asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client.generate("x", max_tokens=1).text())

    with _two() as both:
        with Client(NAME, resolve=Names(*both).resolve) as client:
            for _ in range(4):
                client.generate("x", max_tokens=1).text()
        assert _asked(*both) == [2, 2]
        asyncio.run(run(Names(*both)))
        assert _asked(*both) == [4, 4]


def test_gateways_come_and_go() -> None:
    """One that is new gets streams, one that is named no more gets none."""
    with _two() as (old, new):
        names = Names(old)
        with Client(NAME, resolve=names.resolve) as client:
            client.generate("x", max_tokens=1).text()
            names.gateways = [old, new]
            assert list(client.health().values()) == [Health.READY] * 2
            for _ in range(4):
                client.generate("x", max_tokens=1).text()
            assert _asked(old, new) == [3, 2]
            names.gateways = [new]
            assert len(client.health()) == 1
            for _ in range(4):
                client.generate("x", max_tokens=1).text()
            assert _asked(old, new) == [3, 6]


def test_a_stream_goes_on_at_a_gateway_it_did_not_begin_with() -> None:
    """All gateways are replaced while a stream is open: it goes on through one that came later."""
    with FakeGateway(Script(hold_after=4)) as old, FakeGateway() as new:
        names, reading = Names(old), Reading()

        def replace() -> None:
            names.gateways = [new]
            client.health()
            old.kill()

        with (
            Client(NAME, resolve=names.resolve) as client,
            client.generate("x", max_tokens=9) as stream,
            when_held(old, replace),
        ):
            reading.events += list(stream)
        assert (reading.token_ids(), reading.text()) == (tokens(9), text(9))
        assert stream.resumes >= 1
        assert len(new.requests) == 1


def test_an_abort_finds_the_gateway_behind_the_name() -> None:
    """Whichever serves the request, and though it is named only since; topology too."""
    with _two(Script(hold_after=3)) as (idle, busy):
        names = Names(idle)
        with Client(busy.address) as reader, Client(NAME, resolve=names.resolve) as client:
            client.models()
            stream = reader.generate("x", max_tokens=9, request_id="mine")
            next(stream)
            names.gateways = [idle, busy]
            assert client.topology("mine").shards
            assert client.abort("mine")
            with pytest.raises(errors.Cancelled):
                list(stream)

        async def run() -> None:
            async with AsyncClient(NAME, resolve=names.resolve) as client:
                assert not await client.abort("mine")
                names.gateways = []
                with pytest.raises(errors.Unavailable, match=r"gateways\.test cannot be looked up"):
                    await client.abort("mine")

        asyncio.run(run())


def test_the_certificate_is_for_the_name(tmp_path: Path) -> None:
    """Gateways show one certificate, for the name that clients were given and not for their addresses."""
    signer = authority(tmp_path)
    security = SecurityConfig(tls=signer.tls("gateways", hosts=["gateways.test"]))
    trust = TlsConfig(authority=security.tls.authority)
    with FakeGateway(security=security) as first, FakeGateway(security=security) as second:
        names = Names(first, second)
        with Client(NAME, tls=trust, resolve=names.resolve) as client:
            assert list(client.health().values()) == [Health.READY] * 2
            for _ in range(2):
                assert client.generate("x", max_tokens=3).text() == text(3)
        assert _asked(first, second) == [1, 1]
        with Client(f"127.0.0.1:{first.port}", tls=trust) as client:
            assert list(client.health().values()) == [Health.UNREACHABLE]


def test_a_name_that_nobody_knows_is_said() -> None:
    """When patience is over, in the words of who looked it up last."""
    unknown = "dns:///gateways..test:8650"  # which no resolver asks anybody for
    with Client(unknown, outage_s=0.2, timeout_s=20) as client, pytest.raises(errors.Unavailable) as caught:
        client.models()
    assert "gateways..test" in caught.value.message
