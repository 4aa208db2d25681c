"""What a gateway refuses, with which status and which words; and what it takes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from anabranch.cli import emulating
from anabranch.v1 import inference_pb2, types_pb2
from cluster import errors, rpc
from cluster.config import TlsConfig
from tests.fake_dense import FakeDense, says
from tests.gateways import CONTEXT, TOKENIZER, asynchronous, completion, eventually, fleet, generate
from tests.tokenizer import VOCABULARY_SIZE

Request = inference_pb2.GenerateRequest


def _sampling(**fields: Any) -> Request:
    return Request(text="hello", sampling=types_pb2.SamplingParameters(**fields))


def _chat(*messages: tuple[str, str]) -> Request:
    entries = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return Request(chat=inference_pb2.ChatPrompt(messages=entries))


def _tokens(*ids: int) -> inference_pb2.TokenPrompt:
    return inference_pb2.TokenPrompt(token_ids=ids)


def _resumed(request_id: str = "known", **fields: Any) -> Request:
    given: dict[str, Any] = {"generation": 2, "received": [_tokens(1)]}
    resume = inference_pb2.Resume(**(given | fields))
    return Request(text="hello", request_id=request_id, resume=resume)


INVALID: dict[str, tuple[Request, str]] = {
    "no prompt": (Request(), "no prompt"),
    "empty text": (Request(text=""), "prompt is empty"),
    "no token ids": (Request(tokens=_tokens()), "prompt is empty"),
    "no messages": (_chat(), "no messages"),
    "strange role": (_chat(("wizard", "hello")), "'wizard' must be one of system, user, assistant"),
    "token outside": (
        Request(tokens=_tokens(VOCABULARY_SIZE)),
        f"outside the vocabulary of {VOCABULARY_SIZE}",
    ),
    "long prompt": (Request(tokens=_tokens(*[1] * CONTEXT)), f"the prompt has {CONTEXT} tokens"),
    "long output": (_sampling(max_tokens=CONTEXT), "ask for at most 507 tokens"),
    "no output": (_sampling(max_tokens=0), "max_tokens is 0"),
    "min over max": (_sampling(min_tokens=4, max_tokens=3), "min_tokens is 4"),
    "min over default": (_sampling(min_tokens=CONTEXT), f"min_tokens is {CONTEXT}"),
    "cold": (_sampling(temperature=-0.1), "temperature is -0.1"),
    "not a number": (_sampling(temperature=float("nan")), "temperature is nan"),
    "top_p": (_sampling(top_p=0.0), "top_p is 0.0"),
    "top_k": (_sampling(top_k=VOCABULARY_SIZE + 1), "top_k is"),
    "min_p": (_sampling(min_p=1.5), "min_p is 1.5"),
    "penalty": (_sampling(presence_penalty=2.5), "presence_penalty is 2.5"),
    "repetition": (_sampling(repetition_penalty=0.0), "repetition_penalty is 0.0"),
    "bias": (_sampling(logit_bias={1: 200.0}), "logit_bias of token 1"),
    "bias token": (_sampling(logit_bias={99999: 1.0}), "logit_bias token id"),
    "logprobs": (_sampling(logprobs=21), "logprobs is 21"),
    "stop token": (_sampling(stop_token_ids=[99999]), "stop_token_ids is 99999"),
    "stop tokens": (_sampling(stop_token_ids=[1] * 65), "number of stop_token_ids is 65"),
    "no choices": (Request(text="hello", n=0), "n is 0"),
    "many choices": (Request(text="hello", n=17), "n is 17, must be in [1, 16]"),
    "many stops": (Request(text="hello", stop=["x"] * 17), "17 stop strings"),
    "long stop": (Request(text="hello", stop=["x" * 257]), "257 characters"),
    "empty stop": (Request(text="hello", stop=[""]), "0 characters"),
    "bad id": (Request(text="hello", request_id="a/b"), "request_id must be"),
    "long id": (Request(text="hello", request_id="x" * 129), "request_id must be"),
    "maps alone": (Request(text="hello", shard_maps=[types_pb2.ShardMap()]), "shard_maps without resume"),
    "resume unnamed": (_resumed(request_id=""), "resume without request_id"),
    "resume generation": (_resumed(generation=1), "resume.generation is 1"),
    "resume choices": (_resumed(received=[]), "must name all 1 choices"),
    "resume tokens": (_resumed(received=[_tokens(99999)]), "resume.received: token id 99999"),
    "resume beyond": (
        Request(
            text="hello",
            request_id="known",
            resume=inference_pb2.Resume(generation=2, received=[_tokens(1, 2, 3)]),
            sampling=types_pb2.SamplingParameters(max_tokens=2),
        ),
        "more than max_tokens 2",
    ),
}


@asynchronous
async def test_bad_requests_are_refused_by_name(tmp_path: Path) -> None:
    """Each is INVALID_ARGUMENT with what is wrong; none reaches a dense worker or stays open."""
    worker = FakeDense("dense-0", says("x"))
    async with fleet(tmp_path, [worker]) as cluster:
        stub = cluster.stub()
        for name, (request, words) in INVALID.items():
            with pytest.raises(errors.InvalidRequest) as caught:
                await generate(stub, request)
            assert words in caught.value.message, name
        with pytest.raises(errors.NotFound, match="'other' is not served here; 'tiny' is"):
            await generate(stub, Request(text="hello", model="other"))
        assert cluster.gateways[0].desk.streams_open == 0
    assert worker.submissions == []


@asynchronous
async def test_limits_themselves_are_allowed(tmp_path: Path) -> None:
    """The longest sequence, the most choices and the last token id are taken."""
    worker = FakeDense("dense-0", says("x"))
    async with fleet(tmp_path, [worker], gateway={"default_max_tokens": 4096}) as cluster:
        stub = cluster.stub()
        await generate(stub, Request(tokens=_tokens(*[VOCABULARY_SIZE - 1] * (CONTEXT - 1))))
        await generate(stub, Request(text="hello", n=16))
        await generate(stub, _sampling(max_tokens=CONTEXT - 5))
        await generate(stub, Request(text="hello", stop=["x" * 256] * 16, model="tiny"))
    assert worker.submissions[0].sampling.max_tokens == 1  # what the context leaves
    assert worker.submissions[1].sampling.max_tokens == CONTEXT - 5


@asynchronous
async def test_chat_messages_become_the_template_s_tokens(tmp_path: Path) -> None:
    """Generate and Tokenize render the same prompt for the same messages."""
    worker = FakeDense("dense-0", says("hi"))
    request = _chat(("system", "Be kind."), ("user", "Hello"))
    async with fleet(tmp_path, [worker]) as cluster:
        stub = cluster.stub()
        await generate(stub, request)
        answer = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=request.chat))
        plain = await stub.Tokenize(inference_pb2.TokenizeRequest(text="Hello"))
        with pytest.raises(grpc.RpcError) as caught:
            await stub.Tokenize(inference_pb2.TokenizeRequest())
    rendered = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TOKENIZER.decode(answer.token_ids, skip_special_tokens=False) == rendered
    assert answer.token_ids == worker.submissions[0].prompt_token_ids
    assert list(plain.token_ids) == TOKENIZER.encode("Hello").ids
    assert plain.max_sequence_length == CONTEXT
    assert type(rpc.from_rpc(caught.value)) is errors.InvalidRequest


@asynchronous
async def test_the_model_is_described(tmp_path: Path) -> None:
    """ListModels tells what requests need to know."""
    async with fleet(tmp_path) as cluster:
        answer = await cluster.stub().ListModels(inference_pb2.ListModelsRequest())
    (model,) = answer.models
    assert (model.name, model.architecture) == ("tiny", "LlamaForCausalLM")
    assert (model.max_sequence_length, model.vocabulary_size) == (CONTEXT, VOCABULARY_SIZE)
    assert model.parameters > 0
    assert not model.HasField("dilation")


@asynchronous
async def test_a_cluster_that_emulates_another_tells_whose_time_it_keeps(tmp_path: Path) -> None:
    """ListModels gives the dilation that the cluster was started with."""
    meant = emulating.cluster_of("h100x2,h20x1", "llama3-70b")
    emulation = emulating.overrides(meant, 20.0, tmp_path / "made")["emulation"]
    async with fleet(tmp_path, emulation=emulation) as cluster:
        answer = await cluster.stub().ListModels(inference_pb2.ListModelsRequest())
    assert [model.dilation for model in answer.models] == [20.0]


async def _send_raw(port: int, payload: bytes) -> errors.AnabranchError:
    """Bytes as they are, where a GenerateRequest is expected; the error they get."""
    async with rpc.aio_channel(f"127.0.0.1:{port}", TlsConfig()) as channel:
        as_is: Callable[[bytes], bytes] = bytes
        call = channel.unary_stream(
            "/anabranch.v1.InferenceService/Generate", request_serializer=as_is, response_deserializer=as_is
        )(payload, timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
    return rpc.from_rpc(caught.value)


@asynchronous
async def test_messages_that_are_no_protobuf_or_too_large(tmp_path: Path) -> None:
    """Malformed bytes and text that is not UTF-8 get INVALID_ARGUMENT, a message over the limit
    RESOURCE_EXHAUSTED. The gateway serves on.
    """
    limit = {"max_request_bytes": 4096}
    async with fleet(tmp_path, [FakeDense("dense-0", says("x"))], gateway=limit) as cluster:
        port = cluster.gateways[0].port
        not_text = b"\x1a\x04\xff\xfe\xfd\xfc"  # field 3 (text), four bytes that are not UTF-8
        for payload in (not_text, b"\xff\xff\xff"):
            error = await _send_raw(port, payload)
            assert type(error) is errors.InvalidRequest
            assert "cannot be parsed" in error.message
        too_large = Request(text="x" * 5000).SerializeToString()
        assert type(await _send_raw(port, too_large)) is errors.ResourceExhausted
        assert (await generate(cluster.stub(), completion())).text() == "x"


@asynchronous
async def test_no_more_streams_than_configured(tmp_path: Path) -> None:
    """The request over max_streams gets RESOURCE_EXHAUSTED; after one ends there is room again."""
    worker = FakeDense("dense-0", pause_at=1)
    async with fleet(tmp_path, [worker], gateway={"max_streams": 2}) as cluster:
        stub = cluster.stub()
        calls = [stub.Generate(completion(), timeout=20) for _ in range(2)]
        await eventually(lambda: len(worker.submissions) == 2, "two are open")
        with pytest.raises(errors.ResourceExhausted, match="2 requests are open"):
            await generate(stub, completion())
        calls[0].cancel()
        await eventually(lambda: cluster.gateways[0].desk.streams_open == 1, "one ended")
        worker.pause_at = None
        assert len((await generate(stub, completion())).tokens()) == 20
        calls[1].cancel()


@asynchronous
async def test_a_live_request_s_id_is_taken(tmp_path: Path) -> None:
    """ALREADY_EXISTS while it lives, and free again afterwards."""
    worker = FakeDense("dense-0", pause_at=1)
    async with fleet(tmp_path, [worker]) as cluster:
        stub = cluster.stub()
        first = asyncio.create_task(generate(stub, completion(request_id="mine")))
        await eventually(lambda: len(worker.submissions) == 1, "open")
        with pytest.raises(errors.AlreadyExists, match="'mine' is live"):
            await generate(stub, completion(request_id="mine"))
        worker.pause_at = None
        await first
        assert len((await generate(stub, completion(request_id="mine"))).tokens()) == 20
