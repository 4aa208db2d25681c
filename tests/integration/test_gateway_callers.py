"""API keys: who is let in, how far, and that tenants never meet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from anabranch.v1 import inference_pb2, inference_pb2_grpc
from cluster import errors, rpc
from tests.fake_dense import FakeDense, says
from tests.gateways import asynchronous, completion, eventually, exhaust, expected_letters, fleet
from workers.gateway.callers import CallerDirectory

KEYS = """
key-one: {tenant: one, salt: pepper, max_streams: 1, max_tokens: 30}
key-two: {tenant: two}
"""


def _keys(folder: Path, text: str = KEYS) -> dict[str, str]:
    path = folder / "keys.yaml"
    path.write_text(text)
    return {"api_keys_file": str(path)}


def _call(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    key: str | None,
    request: inference_pb2.GenerateRequest,
) -> grpc.aio.UnaryStreamCall[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]:
    metadata = (("authorization", f"Bearer {key}"),) if key is not None else ()
    return stub.Generate(request, timeout=20, metadata=metadata)


@asynchronous
async def test_only_known_keys_are_served(tmp_path: Path) -> None:
    """No key, an unknown one and another scheme are UNAUTHENTICATED in every call; a known one is served."""
    worker = FakeDense("dense-0", says("x"))
    async with fleet(tmp_path, [worker], security=_keys(tmp_path)) as cluster:
        stub = cluster.stub()
        for key in (None, "key-three", "", "key-one key-one"):
            with pytest.raises(errors.Unauthenticated):
                await exhaust(_call(stub, key, completion()))
        unary = (
            stub.Tokenize(inference_pb2.TokenizeRequest(text="x")),
            stub.ListModels(inference_pb2.ListModelsRequest()),
            stub.GetTopology(inference_pb2.GetTopologyRequest()),
            stub.Abort(inference_pb2.AbortRequest()),
        )
        for call in unary:
            with pytest.raises(grpc.RpcError) as caught:
                await call
            assert type(rpc.from_rpc(caught.value)) is errors.Unauthenticated
        assert (await exhaust(_call(stub, "key-one", completion()))).text() == "x"


@asynchronous
async def test_a_key_s_limits_hold(tmp_path: Path) -> None:
    """Beyond max_tokens or max_streams is PERMISSION_DENIED; defaults stay inside; others are free."""
    worker = FakeDense("dense-0", pause_at=1)
    async with fleet(tmp_path, [worker], security=_keys(tmp_path)) as cluster:
        stub = cluster.stub()
        with pytest.raises(errors.PermissionDenied, match="30 tokens"):
            await exhaust(_call(stub, "key-one", completion(max_tokens=31)))
        open_call = _call(stub, "key-one", inference_pb2.GenerateRequest(text="hello"))
        await eventually(lambda: len(worker.submissions) == 1, "open")
        assert worker.submissions[0].sampling.max_tokens == 30
        with pytest.raises(errors.PermissionDenied, match="1 requests open"):
            await exhaust(_call(stub, "key-one", completion()))
        worker.pause_at = None
        assert (await exhaust(_call(stub, "key-two", completion(max_tokens=40)))).tokens()
        open_call.cancel()


@asynchronous
async def test_tenants_never_meet(tmp_path: Path) -> None:
    """The tenant is a salted hash; under the same id two tenants have two requests, and neither can end,
    see or take over the other's.
    """
    worker = FakeDense("dense-0", pause_at=1)
    async with fleet(tmp_path, [worker], security=_keys(tmp_path)) as cluster:
        stub = cluster.stub()
        first = asyncio.create_task(exhaust(_call(stub, "key-one", completion(request_id="same"))))
        await eventually(lambda: len(worker.submissions) == 1, "open")
        other = (("authorization", "Bearer key-two"),)
        answer = await stub.Abort(inference_pb2.AbortRequest(request_id="same"), metadata=other)
        assert not answer.found
        with pytest.raises(grpc.RpcError) as caught:
            await stub.GetTopology(inference_pb2.GetTopologyRequest(request_id="same"), metadata=other)
        assert type(rpc.from_rpc(caught.value)) is errors.NotFound
        worker.pause_at = None
        resume = inference_pb2.Resume(generation=2, received=[inference_pb2.TokenPrompt()], seed=3)
        second = await exhaust(_call(stub, "key-two", completion(request_id="same", resume=resume)))
        heard = await first
    assert second.tokens() == heard.tokens() == expected_letters()
    one, two = worker.submissions
    assert one.sequence.request_id != two.sequence.request_id
    assert one.tenant != two.tenant
    assert len(one.tenant) == len(two.tenant) == 64
    assert "one" not in one.tenant


@asynchronous
async def test_the_keys_file_is_read_again(tmp_path: Path) -> None:
    """A key added is known at the next call, one removed is not; a file that became wrong changes nothing."""
    worker = FakeDense("dense-0", says("x"))
    async with fleet(tmp_path, [worker], security=_keys(tmp_path)) as cluster:
        stub = cluster.stub()
        _keys(tmp_path, "key-four: {tenant: four}\n")
        assert (await exhaust(_call(stub, "key-four", completion()))).text() == "x"
        with pytest.raises(errors.Unauthenticated):
            await exhaust(_call(stub, "key-one", completion()))
        _keys(tmp_path, "key-four: {tenant: four, colour: red}\n")
        assert (await exhaust(_call(stub, "key-four", completion()))).text() == "x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list\n", "mapping|dictionary"),
        ("secret-key: {tenant: one, max_stream: 3}\n", "max_stream: Extra"),
        ("secret-key: {}\n", "tenant: Field required"),
        ("secret-key: {tenant: one, max_tokens: 0}\n", "max_tokens: "),
        ("secret-key: 3\n", "dictionary"),
        ("secret-key: {tenant: one\n", "line 2: "),
    ],
)
def test_a_wrong_keys_file_is_refused_at_start(tmp_path: Path, text: str, words: str) -> None:
    """ConfigError names file and field, and no key."""
    security = _keys(tmp_path, text)
    with pytest.raises(errors.ConfigError, match=words) as caught:
        CallerDirectory(security["api_keys_file"])
    assert "keys.yaml" in caught.value.message
    assert "secret-key" not in caught.value.message
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        CallerDirectory(str(tmp_path / "absent.yaml"))
