"""The client library against the real gateway, with scripted dense workers behind it."""

from pathlib import Path

import pytest

from anabranch import AsyncClient
from anabranch.answers import Health
from anabranch.events import FinishReason
from cluster import errors
from tests.client_reading import Reading
from tests.fake_dense import FakeDense
from tests.gateways import SEED, TOKENIZER, Fleet, asynchronous, eventually, expected_letters, fleet


def _client(cluster: Fleet, outage_s: float = 10.0) -> AsyncClient:
    """A client of all gateways."""
    addresses = [f"127.0.0.1:{gateway.port}" for gateway in cluster.gateways]
    return AsyncClient(addresses, outage_s=outage_s)


@asynchronous
async def test_every_call_is_understood(tmp_path: Path) -> None:
    """A stream, tokenize, models, topology, abort and health, each through the real service."""
    async with fleet(tmp_path, [FakeDense("dense-0")]) as cluster, _client(cluster) as client:
        whole = await client.generate("hello", max_tokens=20, seed=SEED).text()
        assert whole == TOKENIZER.decode(expected_letters())
        ids = TOKENIZER.encode("hello").ids
        assert (await client.tokenize("hello")).token_ids == tuple(ids)
        assert (await client.models())[0].vocabulary_size > 256
        assert "dense" in {member.role for member in (await client.topology()).members}
        assert not await client.abort("nobody")
        with pytest.raises(errors.NotFound):
            await client.topology("nobody")
        assert list((await client.health()).values()) == [Health.READY]
        with pytest.raises(errors.InvalidRequest, match="temperature"):
            await client.generate("hello", temperature=9.0).text()


@asynchronous
async def test_a_stream_survives_its_gateway(tmp_path: Path) -> None:
    """A gateway stops mid-stream: the client goes on through the other, each token and character once.

    The stop string spans tokens, so text is held back where the stream breaks.
    """
    letters = expected_letters(count=20)
    stop = TOKENIZER.decode(letters[9:12])
    worker = FakeDense("dense-0", pause_at=10)
    async with fleet(tmp_path, [worker], gateways=2) as cluster, _client(cluster) as client:
        stream = client.generate("hello", max_tokens=20, seed=SEED, n=2, stop=stop)
        reading = Reading()
        async for event in stream:
            reading.events.append(event)
            paused = all(len(reading.token_ids(choice)) == 10 for choice in range(2))
            if paused and worker.pause_at is not None:
                await cluster.gateways[0].stop()
                worker.pause_at = None
    assert stream.resumes == 1
    assert reading.text(0) == TOKENIZER.decode(letters[:9])
    assert reading.text(1) == TOKENIZER.decode(expected_letters(choice=1))
    assert reading.token_ids(1) == expected_letters(choice=1)
    assert {end.choice: (end.reason, end.matched_stop) for end in reading.finished} == {
        0: (FinishReason.STOP, stop),
        1: (FinishReason.LENGTH, None),
    }


@asynchronous
async def test_a_stopped_cluster_is_named(tmp_path: Path) -> None:
    """The only gateway stops in the middle of a stream: the client says so, once its patience is over."""
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster, _client(cluster, outage_s=0.2) as client:
        stream = client.generate("hello", max_tokens=20)
        while not (await anext(stream)).text:
            continue
        await cluster.gateways[0].stop()
        with pytest.raises(errors.Unavailable, match="one said that it stops; is the cluster down"):
            await stream.text()


@asynchronous
async def test_cancel_reaches_the_dense_worker(tmp_path: Path) -> None:
    """Hanging up ends the sequence where it is computed."""
    worker = FakeDense("dense-0", pause_at=3)
    async with fleet(tmp_path, [worker]) as cluster, _client(cluster) as client:
        async with client.generate("hello", max_tokens=20) as stream:
            await anext(stream)
            await eventually(lambda: len(worker.submissions) == 1, "submitted")
        await eventually(lambda: len(worker.aborts) == 1, "aborted")
