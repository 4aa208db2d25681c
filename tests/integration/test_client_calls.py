"""Unary calls, cancelling and closing, of both clients over real servers."""

import asyncio
import contextlib
import threading
import tomllib

import pytest

import anabranch
from anabranch import AsyncClient, Client
from anabranch.answers import Health
from anabranch.events import TokenDelta
from cluster import errors
from tests.client_reading import when_held
from tests.fake_gateway import FakeGateway, Script
from tests.tidy.source import ROOT


def test_cancel_ends_the_request_at_the_gateway() -> None:
    """After `cancel` reading raises Cancelled, from another thread too, and the gateway sees the hang-up."""
    with FakeGateway(Script(hold_after=3)) as gateway, Client(gateway.address) as client:
        stream = client.generate("x", max_tokens=9)
        seen = [next(stream), next(stream), next(stream)]
        with when_held(gateway, stream.cancel), pytest.raises(errors.Cancelled):
            next(stream)
        assert [event.token_ids for event in seen if isinstance(event, TokenDelta)] == [(0,), (1,)]
        assert gateway.hung_up.wait(10)
        assert list(stream) == []


def test_cancel_wakes_a_stream_that_waits_for_a_gateway() -> None:
    """A pause between attempts ends at once."""
    with FakeGateway() as gateway, Client(gateway.address, outage_s=60) as client:
        gateway.kill()
        stream = client.generate("x")
        timer = threading.Timer(0.3, stream.cancel)
        timer.start()
        with pytest.raises(errors.Cancelled):
            stream.text()
        timer.join(5)


def test_leaving_the_block_hangs_up() -> None:
    """A stream left half read is ended at the gateway, and its iteration is over."""
    with FakeGateway(Script(hold_after=3)) as gateway, Client(gateway.address) as client:
        with client.generate("x", max_tokens=9) as stream:
            next(stream)
        assert gateway.hung_up.wait(10)
        assert list(stream) == []


def test_an_asyncio_stream_is_cancelled_in_three_ways() -> None:
    """`cancel`, leaving the block, and cancelling the reading task each reach the gateway."""

    async def held() -> None:
        assert await asyncio.to_thread(gateway.held.wait, 10)

    async def by_cancel(client: AsyncClient) -> None:
        stream = client.generate("x", max_tokens=9)
        task = asyncio.create_task(stream.text())
        await held()
        stream.cancel()
        with pytest.raises(errors.Cancelled):
            await task

    async def by_leaving(client: AsyncClient) -> None:
        async with client.generate("x", max_tokens=9) as stream:
            await anext(stream)
            await held()

    async def by_task(client: AsyncClient) -> None:
        task = asyncio.create_task(client.generate("x", max_tokens=9).text())
        await held()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def run() -> None:
        for way in (by_cancel, by_leaving, by_task):
            gateway.hung_up.clear()
            gateway.held.clear()
            async with AsyncClient(gateway.address) as client:
                await way(client)
                assert await asyncio.to_thread(gateway.hung_up.wait, 10), way.__name__

    with FakeGateway(Script(hold_after=2)) as gateway:
        asyncio.run(run())


def test_a_request_is_found_at_the_gateway_that_serves_it() -> None:
    """Topology and abort ask every gateway; a request nobody knows is NotFound, or nothing to abort."""
    with (
        FakeGateway() as idle,
        FakeGateway(Script(hold_after=3)) as busy,
        Client(busy.address) as reader,
        Client([idle.address, busy.address]) as client,
    ):
        stream = reader.generate("x", max_tokens=9, request_id="mine")
        for _ in range(3):
            next(stream)
        (shard,) = client.topology("mine").shards
        assert (shard.worker_id, shard.committed_tokens, shard.end_position) == ("attention-0", 5, 64)
        assert client.abort("mine")
        with pytest.raises(errors.Cancelled):
            next(stream)
        assert not client.abort("mine")
        with pytest.raises(errors.NotFound, match="mine"):
            client.topology("mine")


def test_an_unreachable_gateway_leaves_doubt() -> None:
    """Where one that might serve the request is gone, abort and topology say so."""
    with FakeGateway() as gone, FakeGateway() as here:
        gone.kill()
        with Client([gone.address, here.address]) as client:
            for ask in (client.abort, client.topology):
                with pytest.raises(errors.Unavailable, match=gone.address):
                    ask("mine")
            assert client.health() == {
                gone.address: Health.UNREACHABLE,
                here.address: Health.READY,
            }


def test_unary_calls_pass_over_a_dead_gateway() -> None:
    """Each answers through the gateway that lives, whichever it begins with, in both clients."""
    with FakeGateway() as gone, FakeGateway() as here:
        gone.kill()
        with Client([gone.address, here.address]) as client:
            for _ in range(2):
                assert client.tokenize("a b c").token_ids == (0, 1, 2)
                assert client.models()[0].vocabulary_size == 1000
                assert client.topology().members[0].state == "ready"

        async def run() -> None:
            async with AsyncClient([gone.address, here.address]) as client:
                for _ in range(2):
                    answer = await client.tokenize(messages=[{"role": "user", "content": "a b"}])
                    assert answer.token_ids == (0, 1)
                    member = (await client.topology()).members[0]
                    assert member.blocks is not None
                    assert member.blocks.free == 8
                assert (await client.health())[gone.address] is Health.UNREACHABLE

        asyncio.run(run())


def test_calls_begin_at_one_gateway_after_the_other() -> None:
    """Requests of one client spread over its gateways."""
    with FakeGateway() as first, FakeGateway() as second:
        with Client([first.address, second.address]) as client:
            for _ in range(4):
                client.generate("x", max_tokens=1).text()
        assert (len(first.requests), len(second.requests)) == (2, 2)


def test_a_closed_client_says_so() -> None:
    """Reading and asking after `close` is Unavailable, not a crash inside gRPC."""
    with FakeGateway(Script(hold_after=2)) as gateway:
        client = Client(gateway.address)
        stream = client.generate("x", max_tokens=4)
        next(stream)
        client.close()
        with pytest.raises(errors.Unavailable, match="closed"):
            list(stream)
        with pytest.raises(errors.Unavailable, match="closed"):
            client.models()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompt, messages and token_ids"),
        ({"prompt": "x", "token_ids": [1]}, "exactly one"),
        ({"prompt": "x", "n": 0}, r"n is 0, must be an integer in \[1, 128\]"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "top_k": "many"}, "top_k is 'many'"),
        ({"prompt": "x", "logit_bias": {"a": 1.0}}, "logit_bias is"),
        ({"token_ids": [-3]}, r"token_ids is \[-3\]"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]"),
        ({"prompt": 7}, "text is 7"),
    ],
)
def test_values_that_fit_no_field_are_refused_here(arguments: dict[str, object], message: str) -> None:
    """What cannot be put into a request is InvalidRequest, naming the value, before anything is sent."""
    with Client("127.0.0.1:1") as client, pytest.raises(errors.InvalidRequest, match=message):
        client.generate(**arguments)  # type: ignore[arg-type]  # wrong types are the claim


def test_an_unknown_option_is_a_type_error() -> None:
    """A misspelt keyword is refused as Python refuses it."""
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="'temprature'"):
        client.generate("x", temprature=1.0)  # type: ignore[call-arg]  # misspelling is the claim


def test_no_address_is_refused() -> None:
    """A client needs somewhere to go."""
    for nowhere in ([], "", [""]):
        with pytest.raises(errors.InvalidRequest, match="host:port"), contextlib.closing(Client(nowhere)):
            pass


def test_all_options_reach_the_gateway() -> None:
    """Every keyword lands in its field; absent ones stay absent."""
    with FakeGateway() as gateway, Client(gateway.address) as client:
        client.generate(
            token_ids=[5, 6],
            model="m",
            temperature=0.0,
            top_p=0.5,
            top_k=3,
            min_p=0.25,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=2.0,
            logit_bias={7: -2.0},
            seed=2**64 - 1,
            max_tokens=1,
            min_tokens=1,
            stop="a",
            stop_token_ids=[9],
            ignore_eos=True,
            logprobs=2,
            priority=-4,
            include_stop=True,
        ).text()
        client.generate(messages=[{"role": "user", "content": "x"}], max_tokens=1, top_p=None).text()
    full, bare = gateway.requests
    assert list(full.tokens.token_ids) == [5, 6]
    assert (full.model, list(full.stop), full.priority, full.include_stop) == ("m", ["a"], -4, True)
    sampling = full.sampling
    assert sampling.temperature == 0.0
    assert sampling.HasField("temperature")
    assert dict(sampling.logit_bias) == {7: -2.0}
    assert (sampling.seed, list(sampling.stop_token_ids)) == (2**64 - 1, [9])
    assert {field.name for field, _ in bare.sampling.ListFields()} == {"seed", "max_tokens"}
    assert bare.chat.messages[0].content == "x"


def test_the_version_is_the_packages() -> None:
    """`anabranch.__version__` and pyproject.toml say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == anabranch.__version__
