"""Gateways for tests: real servers on free ports, a tiny tokenizer, scripted dense workers, one loop."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import grpc

from anabranch.v1 import control_pb2, inference_pb2, inference_pb2_grpc, types_pb2
from cluster import rpc
from cluster.config import Config, TlsConfig
from cluster.types import WorkerId, draw_epoch
from tests.fake_dense import FakeDense, scripted_letters
from tests.tokenizer import BOS_ID, EOS_ID, VOCABULARY_SIZE, build_tokenizer, write_tokenizer
from workers.gateway.dense_link import GatewayIdentity
from workers.gateway.gateway import Gateway
from workers.gateway.served_model import ServedModel

TOKENIZER = build_tokenizer()
CONTEXT = 512
WAIT_S = 20.0
SEED = 3

P = ParamSpec("P")


def asynchronous(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a coroutine test on a loop of its own, with a deadline."""

    @functools.wraps(test)
    def run(*arguments: P.args, **keywords: P.kwargs) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await test(*arguments, **keywords)

        asyncio.run(limited())

    return run


async def eventually(condition: Callable[[], bool], what: str) -> None:
    """Let the loop run until `condition` holds; fails after some seconds."""
    deadline_s = asyncio.get_running_loop().time() + WAIT_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline_s, f"never: {what}"
        await asyncio.sleep(0.002)


def completion(text: str = "hello", max_tokens: int = 20, **fields: Any) -> inference_pb2.GenerateRequest:
    """A request with a fixed seed."""
    sampling = types_pb2.SamplingParameters(max_tokens=max_tokens, seed=SEED)
    return inference_pb2.GenerateRequest(text=text, sampling=sampling, **fields)


def expected_letters(text: str = "hello", count: int = 20, choice: int = 0) -> list[int]:
    """What the script `letters` continues `completion(text)` with."""
    prompt = tuple(TOKENIZER.encode(text).ids)
    return [scripted_letters(prompt, SEED, choice, index) for index in range(count)]


def model_folder(folder: Path) -> Path:
    """A model folder without weights: what a gateway needs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@dataclass
class Fleet:
    """Scripted dense workers and the gateways in front of them; `tell` announces who lives."""

    config: Config
    model: ServedModel
    dense: list[FakeDense] = field(default_factory=list)
    gateways: list[Gateway] = field(default_factory=list)
    others: list[inference_pb2.Member] = field(default_factory=list)
    channels: list[grpc.aio.Channel] = field(default_factory=list)
    version: int = 0

    async def add_dense(self, worker: FakeDense) -> FakeDense:
        """Start a dense worker and announce it."""
        self.dense.append(await worker.start())
        self.tell()
        return worker

    async def lose_dense(self, worker: FakeDense) -> None:
        """End a dense worker, and announce it."""
        await worker.die()
        self.dense.remove(worker)
        self.tell()

    async def add_gateway(self) -> Gateway:
        """Start a gateway that knows everyone, and wait until it serves if there is a dense worker."""
        identity = GatewayIdentity(WorkerId(f"gateway-{len(self.gateways)}"), draw_epoch())
        gateway = Gateway(self.config, identity, self.model)
        self.gateways.append(gateway)
        await gateway.start()
        self.tell()
        if self.dense:
            await eventually(lambda: gateway.ready, "a link to a dense worker")
        return gateway

    def tell(self) -> None:
        """Announce the present members to all gateways."""
        self.version += 1
        members = [worker.member() for worker in self.dense] + self.others
        for gateway in self.gateways:
            gateway.set_membership(control_pb2.Membership(version=self.version, members=members))

    def stub(self, gateway: Gateway | None = None) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        """A client of a gateway, the first one if not said."""
        port = (gateway or self.gateways[0]).port
        channel = rpc.aio_channel(f"127.0.0.1:{port}", TlsConfig())
        self.channels.append(channel)
        return inference_pb2_grpc.InferenceServiceStub(channel)

    @property
    def http(self) -> str:
        """Address of the first gateway's HTTP server."""
        return f"http://127.0.0.1:{self.gateways[0].http_port}"


@asynccontextmanager
async def fleet(
    folder: Path, dense: Sequence[FakeDense] = (), gateways: int = 1, **sections: dict[str, Any]
) -> AsyncIterator[Fleet]:
    """Gateways and dense workers for one test; `sections` override configuration sections."""
    gateway = {"port": 0, "http_port": 0, "default_deadline_ms": 30_000} | sections.pop("gateway", {})
    path = str(model_folder(folder / "tiny"))
    config = Config.model_validate({"model": {"path": path}, "gateway": gateway} | sections)
    members = Fleet(config, ServedModel.load(config))
    try:
        for worker in dense:
            await members.add_dense(worker)
        for _ in range(gateways):
            await members.add_gateway()
        yield members
    finally:
        for channel in members.channels:
            await channel.close()
        closing: list[Awaitable[None]] = [gateway.stop() for gateway in members.gateways]
        await asyncio.gather(*closing, *(worker.die() for worker in members.dense))


@dataclass
class Heard:
    """What a client got from one stream."""

    events: list[inference_pb2.GenerateResponse] = field(default_factory=list)

    def tokens(self, choice: int = 0) -> list[int]:
        """Tokens of a choice in order of arrival; each delta must start where the last one ended."""
        tokens: list[int] = []
        for event in self.events:
            if event.HasField("delta") and event.delta.choice == choice:
                assert event.delta.first_index == len(tokens)
                tokens.extend(event.delta.token_ids)
        return tokens

    def text(self, choice: int = 0) -> str:
        """Text of a choice."""
        return "".join(event.delta.text for event in self.events if event.delta.choice == choice)

    def finished(self, choice: int = 0) -> inference_pb2.Finished:
        """The end of a choice; there must be exactly one."""
        ends = [event.finished for event in self.events if event.HasField("finished")]
        (end,) = [end for end in ends if end.choice == choice]
        return end

    @property
    def started(self) -> inference_pb2.Started:
        """The first event."""
        assert self.events[0].HasField("started")
        return self.events[0].started


async def exhaust(call: AsyncIterable[inference_pb2.GenerateResponse]) -> Heard:
    """Read a stream to its end. Raises errors of the tree."""
    heard = Heard()
    try:
        async for event in call:
            heard.events.append(event)
    except grpc.RpcError as error:
        raise rpc.from_rpc(error) from error
    return heard


async def generate(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, request: inference_pb2.GenerateRequest
) -> Heard:
    """Run a request to its end. Raises errors of the tree."""
    return await exhaust(stub.Generate(request, timeout=WAIT_S))
