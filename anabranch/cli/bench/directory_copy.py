"""The directory's copy in a Redis of the bench's own: blocks written and restored, memory, and a question."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from time import perf_counter

from anabranch.cli.bench.children import next_line, peak_bytes
from anabranch.cli.bench.directory import PREFIX_BLOCKS, QUESTIONS, identity_of, report_of
from anabranch.cli.bench.records import Results, figure
from anabranch.v1 import control_pb2, inference_pb2
from cluster.blocks import BlockHash
from cluster.policies.directory import Life, Run
from cluster.registry.interface import ControllerRecord, Registry
from cluster.registry.opening import open_registry
from cluster.registry.settings import RegistryConfig
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId
from controller.directory_copy import DirectoryCopy
from controller.directory_service import DirectoryKeeper
from controller.membership import MembershipTable, Terms
from workers.dense.finder import CopyFinder

_WRITER = Epoch(1)
_ROUND_S = 0.1
"""What a controller takes of a heartbeat of half a second."""


def measure(program: str, workers: int, blocks: int) -> Results:
    """Records of a copy of `workers` x `blocks` entries in the Redis server that `program` starts."""
    settings = {"workers": workers, "blocks_per_worker": blocks, "round_s": _ROUND_S}
    with _server(program) as (process_id, config), contextlib.closing(open_registry(config)) as registry:
        registry.claim(ControllerRecord(_WRITER, "127.0.0.1:8600", "", b""), take_over=True)
        keeper = DirectoryKeeper(MembershipTable(Terms("bench", 1000, 2000)))
        copy = DirectoryCopy(keeper, _ROUND_S)
        empty_bytes = peak_bytes(process_id)
        written = list(_rates(keeper, copy, registry, workers, blocks, number=1))
        entry_bytes = (peak_bytes(process_id) - empty_bytes) / (workers * blocks)
        questions = _question_s(config, min(PREFIX_BLOCKS, blocks))
        restored = workers * blocks / _restore_s(registry, workers, min(PREFIX_BLOCKS, blocks))
        changed = list(_rates(keeper, copy, registry, workers, blocks, number=2))
    return {
        "copy_written": figure(written, "1/s", settings=settings),
        "copy_changed": figure(changed, "1/s", settings=settings),
        "copy_memory_per_entry": figure([entry_bytes], "B", settings=settings),
        "copy_restored": figure([restored], "1/s", settings=settings),
        "copy_question": figure(questions, "s", settings=settings | {"blocks": min(PREFIX_BLOCKS, blocks)}),
    }


@contextlib.contextmanager
def _server(program: str) -> Iterator[tuple[int, RegistryConfig]]:
    """A Redis on loopback that keeps nothing on disk: its process, and where it is. Raises ConfigError."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        words = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", ""]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                while "Ready to accept connections" not in next_line(process):
                    continue
                yield process.pid, RegistryConfig(url=f"redis://127.0.0.1:{port}/0", deadline_ms=5000)
            finally:
                process.terminate()


def _rates(
    keeper: DirectoryKeeper, copy: DirectoryCopy, registry: Registry, workers: int, blocks: int, number: int
) -> Iterator[float]:
    """Entries per second of each worker's report, from the directory to the answer of Redis."""
    first = workers * blocks if number > 1 else 0
    gained = 2 * (blocks // 2) - blocks if number > 1 else blocks
    for worker in range(workers):
        assert keeper.take(report_of(worker, blocks, number))
        began_s = perf_counter()
        copy.write(registry, _WRITER, is_refresh=False)
        while copy.kept != first + (worker + 1) * gained:  # one round was too short
            copy.write(registry, _WRITER, is_refresh=False)
        yield blocks / (perf_counter() - began_s)


def _question_s(config: RegistryConfig, blocks: int) -> Sequence[float]:
    """Finding a prefix that lies at one worker, as a dense worker does."""
    finder = CopyFinder(config)
    hashes: list[BlockHash] = [identity_of(0, block, 1) for block in range(blocks)]
    samples = []
    for _ in range(QUESTIONS):
        began_s = perf_counter()
        found = finder.find(hashes, 0)
        samples.append(perf_counter() - began_s)
        assert found == (Run(blocks, (Life(WorkerId("attention-0"), Epoch(1)),)),)
    finder.close()
    return samples


def _restore_s(registry: Registry, workers: int, blocks: int) -> float:
    """Until a restarted controller, which knows the members, has taken over all blocks, in rounds."""
    table = MembershipTable(Terms("bench", 1000, 2000))
    for worker in range(workers):
        table.register(_registration(worker))
    keeper = DirectoryKeeper(table)
    copy = DirectoryCopy(keeper, _ROUND_S)
    asked = control_pb2.FindPrefixRequest(block_hashes=[identity_of(0, block, 1) for block in range(blocks)])
    began_s = perf_counter()
    copy.inherit(registry)
    while copy.is_reading:
        copy.write(registry, _WRITER, is_refresh=False)
    taken_s = perf_counter() - began_s
    assert [run.blocks for run in keeper.find(asked)] == [blocks]
    return taken_s


def _registration(worker: int) -> control_pb2.RegisterRequest:
    member = inference_pb2.Member(
        worker_id=f"attention-{worker}",
        role=inference_pb2.ROLE_ATTENTION,
        epoch=worker + 1,
        address="127.0.0.1:9",
    )
    return control_pb2.RegisterRequest(
        member=member, wire_version=WIRE_VERSION, layout_version=LAYOUT_VERSION, config_digest="bench"
    )
