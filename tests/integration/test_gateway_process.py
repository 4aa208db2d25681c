"""Gateways as processes, under a bare membership and in front of a scripted dense worker: signals, kills."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from anabranch import AsyncClient
from anabranch.events import TokenDelta
from anabranch.v1 import control_pb2, inference_pb2, types_pb2
from cluster import config as configuration
from cluster.errors import Unavailable
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, draw_epoch
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService
from tests.fake_dense import FakeDense
from tests.gateways import TOKENIZER, asynchronous, eventually, expected_letters, model_folder

SEED = 3


class Processes:
    """Gateway processes, and the membership they join."""

    def __init__(self, folder: Path) -> None:
        overrides = {
            "model.path": str(model_folder(folder / "tiny")),
            "gateway.port": 0,
            "gateway.http_port": None,
            "controller.port": 0,
            "controller.heartbeat_ms": 50,
        }
        self.config = configuration.load(None, overrides)
        self._file = folder / "config.yaml"
        self._file.write_text(self.config.to_yaml())
        self.table = MembershipTable(Terms(self.config.digest, 50, 2500))
        service = ControlService(
            self.table, draw_epoch(), types_pb2.KvGeometry(), lambda: (), lambda _grace_ms: None
        )
        self._server = ControlServer(self.config, service)
        self.running: list[subprocess.Popen[bytes]] = []

    def join(self, worker: FakeDense) -> None:
        """Announce a scripted dense worker; nobody here expires."""
        self.table.register(
            control_pb2.RegisterRequest(
                member=worker.member(),
                wire_version=WIRE_VERSION,
                layout_version=LAYOUT_VERSION,
                config_digest=self.config.digest,
            )
        )

    async def launch(self) -> str:
        """Start one more gateway; returns its address once it is ready."""
        name = f"gateway-{len(self.running)}"
        command = [sys.executable, "-m", "workers.gateway", "--config", str(self._file)]
        command += ["--worker-id", name, "--controller", f"127.0.0.1:{self._server.port}"]
        self.running.append(subprocess.Popen(command))  # noqa: ASYNC220  starting takes no time
        await eventually(lambda: self._address(name) is not None, f"{name} is ready")
        address = self._address(name)
        assert address is not None
        return address

    def draining(self) -> bool:
        """Whether a member says that it drains."""
        draining = inference_pb2.MEMBER_STATE_DRAINING
        return any(member.state == draining for member in self.table.membership().members)

    def _address(self, name: str) -> str | None:
        ready = inference_pb2.MEMBER_STATE_READY
        members = self.table.membership().members
        return next((m.address for m in members if m.worker_id == name and m.state == ready), None)

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.running:
            process.kill()
            process.wait(20)
        self._server.stop()


@asynccontextmanager
async def processes(folder: Path, worker: FakeDense) -> AsyncIterator[Processes]:
    """No gateway yet, and one dense worker."""
    members = Processes(folder)
    try:
        members.join(await worker.start())
        yield members
    finally:
        await worker.die()
        await asyncio.to_thread(members.close)


async def _consume(client: AsyncClient, tokens: list[int]) -> str:
    """One generation; `tokens` grows while it runs. Returns the text."""
    text = ""
    async for event in client.generate("hello", max_tokens=20, seed=SEED):
        text += event.text
        if isinstance(event, TokenDelta):
            assert event.first_index == len(tokens)
            tokens += event.token_ids
    return text


@asynchronous
async def test_sigterm_finishes_streams_and_ends_with_success(tmp_path: Path) -> None:
    """After SIGTERM the open stream gets all its tokens, a new one is refused, the process exits 0."""
    worker = FakeDense("dense-0", pause_at=3)
    async with processes(tmp_path, worker) as members:
        address = await members.launch()
        tokens: list[int] = []
        async with AsyncClient(address, outage_s=0.0) as client:
            stream = asyncio.create_task(_consume(client, tokens))
            await eventually(lambda: len(tokens) == 3, "three tokens")
            members.running[0].send_signal(signal.SIGTERM)
            await eventually(members.draining, "the gateway drains")
            with pytest.raises(Unavailable):
                await client.generate("other", max_tokens=1, seed=SEED).text()
            worker.pause_at = None
            assert await stream == TOKENIZER.decode(expected_letters())
        assert await asyncio.to_thread(members.running[0].wait, 20) == 0
    assert tokens == expected_letters()


@asynchronous
async def test_a_killed_gateway_costs_no_token(tmp_path: Path) -> None:
    """SIGKILL in mid-stream: the client library goes on through the other gateway, each token once."""
    worker = FakeDense("dense-0", pause_at=7)
    async with processes(tmp_path, worker) as members:
        addresses = [await members.launch(), await members.launch()]
        tokens: list[int] = []
        async with AsyncClient(addresses) as client:
            stream = asyncio.create_task(_consume(client, tokens))
            await eventually(lambda: len(tokens) == 7, "seven tokens")
            members.running[0].kill()
            worker.pause_at = None
            assert await stream == TOKENIZER.decode(expected_letters())
    assert tokens == expected_letters()
    first, second = worker.submissions
    assert second.sequence == first.sequence
    assert second.generation > first.generation
    assert list(second.output_token_ids) == tokens[:7]
    assert second.shard_map == types_pb2.ShardMap(
        shards=[types_pb2.ShardRef(worker_id="attention-0", epoch=7, shard_id=worker.port, end_position=64)]
    )
