"""Time to the first token with and without a prefix that another dense worker computed.

One process: an attention worker on loopback that reports to a control server, and two engines that ask it.
One request runs at a time, so that neither takes the other's core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from time import monotonic, sleep

import torch

from anabranch.cli.bench.own import Batch
from anabranch.cli.bench.records import Results, figure, ratio
from anabranch.v1 import inference_pb2
from anabranch.wire import geometry_message
from cluster.config import Config
from cluster.errors import DeadlineExceeded
from cluster.sampling import SamplingParameters
from cluster.types import KvGeometry, SequenceKey, WorkerId, draw_epoch
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService
from workers.attention.worker import AttentionWorker
from workers.dense.engine import Engine
from workers.dense.finder import PrefixFinder
from workers.dense.members import AttentionMember
from workers.dense.model import Decoder
from workers.dense.prefixes import BlockChain
from workers.dense.remote_peer import RemotePeer
from workers.dense.sequences import Submission
from workers.kernels.select import select
from workers.lanes.agreement import rows_most
from workers.lanes.dial import Caller
from workers.membership import MembershipClient
from workers.peer import AttentionPeer
from workers.role import RoleContext

_ATTENTION = WorkerId("attention-0")
_TAIL_TOKENS = 20
_OUTPUT_TOKENS = 3
"""Enough that the prompt is certain, and its blocks are sealed."""
_WAIT_S = 60.0
_ARENA_BYTES = 2**31


def measure(model: str, tokens: int, repeats: int) -> Results:
    """For each of some prefixes: the first dense worker computes it, then the second finds it."""
    config = Config.model_validate(
        {
            "model": {"path": model, "dtype": "bfloat16"},
            "attention": {"replicas": 1, "arena": _ARENA_BYTES},
            "controller": {"port": 0, "heartbeat_ms": 50, "expiry_ms": 60_000},
        }
    )
    decoder = Decoder.from_folder(model, torch.bfloat16)
    settings = {"model": config.model.served_name, "prefix_tokens": tokens, "tail_tokens": _TAIL_TOKENS}
    with _serving(config, decoder) as pool:
        pool.request(pool.engines[0], pool.prompt(tokens, 0), 0)  # warms both up: compiled code, lanes
        pool.request(pool.engines[1], pool.prompt(tokens, 1), 0)
        alone, found, asked = [], [], []
        for round_number in range(2, repeats + 2):
            prefix = pool.prompt(tokens, round_number)
            alone.append(pool.request(pool.engines[0], prefix, 0))
            pool.wait_known(prefix)
            asked.append(pool.ask(prefix))
            found.append(pool.request(pool.engines[1], prefix, 1))
    return {
        "question": figure(asked, "s", settings=settings),
        "first_token_computed": figure(alone, "s", settings=settings),
        "first_token_found": figure(found, "s", settings=settings),
        "speedup": ratio(("computed", alone), ("found", found), "s", at_least=5.0, settings=settings),
    }


@dataclass(frozen=True)
class _Pool:
    """Two engines over one pool, and who knows what lies there."""

    engines: tuple[Engine, Engine]
    finder: PrefixFinder
    geometry: KvGeometry
    vocabulary_size: int
    names: Iterator[int]

    def prompt(self, tokens: int, seed: int) -> tuple[int, ...]:
        """Tokens drawn from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(self.vocabulary_size, (tokens,), generator=generator).tolist())

    def request(self, engine: Engine, prefix: tuple[int, ...], seed: int) -> float:
        """Seconds to the first token of a request that begins with `prefix`, run to its end."""
        prompt = (*prefix, *self.prompt(_TAIL_TOKENS, 1000 + seed))
        sampling = SamplingParameters(temperature=0.0, ignore_eos=True, seed=0, max_tokens=_OUTPUT_TOKENS)
        key, deadline_s = SequenceKey(f"bench-{next(self.names)}"), monotonic() + _WAIT_S
        batch = Batch(engine, 1)
        submission = Submission(key, 1, prompt, (), sampling, 0, _OUTPUT_TOKENS, 0, deadline_s, "bench")
        engine.submit(submission, batch, _WAIT_S)
        batch.wait()
        return batch.prefill_s

    def ask(self, prefix: tuple[int, ...]) -> float:
        """Seconds of one call to the directory: what a request pays whose prefix lies nowhere."""
        chain = BlockChain(self.geometry, "bench")
        chain.grow(prefix)
        began_s = monotonic()
        self.finder.find(chain.hashes, 0)
        return monotonic() - began_s

    def wait_known(self, prefix: tuple[int, ...]) -> None:
        """Until the directory knows the prefix. Raises DeadlineExceeded."""
        chain = BlockChain(self.geometry, "bench")
        chain.grow(prefix)
        deadline_s = monotonic() + _WAIT_S
        while sum(run.blocks for run in self.finder.find(chain.hashes, 0)) < len(chain.hashes):
            if monotonic() > deadline_s:
                raise DeadlineExceeded("the directory did not hear of the prefix")
            sleep(0.01)


@contextlib.contextmanager
def _serving(config: Config, decoder: Decoder) -> Iterator[_Pool]:
    geometry = decoder.spec.geometry(config.model.dtype, config.attention.block_tokens)
    terms = Terms(config.digest, config.controller.heartbeat_ms, config.controller.expiry_ms)
    message = geometry_message(geometry)
    service = ControlService(
        MembershipTable(terms), draw_epoch(), message, lambda: (), lambda _grace_ms: None
    )
    with contextlib.ExitStack() as stack:
        server = ControlServer(config, service)
        stack.callback(server.stop)
        address = f"127.0.0.1:{server.port}"
        finder = PrefixFinder(address, config.security.tls)
        stack.callback(finder.close)
        member = _attention(config, geometry, address, stack)
        engines = tuple(_engine(config, decoder, member, finder, stack) for _ in range(2))
        yield _Pool((engines[0], engines[1]), finder, geometry, decoder.spec.vocabulary_size, count())


def _attention(
    config: Config, geometry: KvGeometry, controller: str, stack: contextlib.ExitStack
) -> AttentionMember:
    epoch = draw_epoch()
    worker = AttentionWorker(config, _ATTENTION, epoch)
    worker.start(geometry)
    stack.callback(worker.stop)
    address = f"127.0.0.1:{worker.port}"
    client = MembershipClient(
        RoleContext("attention", config, _ATTENTION, 0, epoch, controller),
        inference_pb2.ROLE_ATTENTION,
        address,
        worker.load,
        on_change=lambda _membership: None,
        on_fenced=lambda: None,
    )
    client.start()
    client.set_pool(worker.core.journal)
    stack.callback(client.close)
    blocks = worker.core.arena.blocks
    return AttentionMember(_ATTENTION, epoch, address, blocks, blocks)


def _engine(
    config: Config,
    decoder: Decoder,
    member: AttentionMember,
    finder: PrefixFinder,
    stack: contextlib.ExitStack,
) -> Engine:
    geometry = decoder.spec.geometry(config.model.dtype, config.attention.block_tokens)
    rows = rows_most(config, geometry)
    caller = Caller(WorkerId("dense-0"), draw_epoch(), geometry, config.lanes.transports, rows)

    def connect(known: AttentionMember) -> AttentionPeer:
        return RemotePeer(known, caller, config.security.tls)

    engine = Engine(config, decoder, select("auto", "cpu"), connect, find=finder.find)
    engine.start()
    stack.callback(engine.stop)
    engine.pool.update([member])
    engine.pool.wait_connected(_WAIT_S)
    return engine
