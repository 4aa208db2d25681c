"""The controller at the size of a large cluster: reports it takes, heartbeats it answers, memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from time import perf_counter

from anabranch.cli.bench.records import Results, figure
from anabranch.v1 import control_pb2, inference_pb2
from cluster.blocks import BlockHash, child
from cluster.clock import ManualClock
from cluster.policies.directory import Directory, Life
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId
from controller.directory_service import DirectoryKeeper, read_report
from controller.membership import MembershipTable, Terms
from workers.attention.journal import Journal
from workers.attention.ledger import BlockLedger
from workers.role import read_memory

_TERMS = Terms("bench", 500, 2500)
_DENSE_EVERY = 10
"""One in so many members is a dense worker, which decides by what the others report."""
_ROUNDS = 10
_REPORTS_PER_SAMPLE = 50
QUESTIONS = 101
PREFIX_BLOCKS = 63
"""A prefix of 2,000 tokens in blocks of 32."""
_ROOT = BlockHash(bytes(32))


def measure(workers: int, blocks: int) -> Results:
    """Records of a directory of `workers` x `blocks` entries; reports arrive as bytes, as from the wire."""
    settings = {"workers": workers, "blocks_per_worker": blocks}
    keeper = DirectoryKeeper(MembershipTable(_TERMS))
    keeper.follow(from_nothing=True)  # as a controller does for the registry's copy
    first = list(_rates(keeper, workers, blocks, number=1))
    churn = list(_rates(keeper, workers, blocks, number=2))
    rounds = list(_rounds_s(workers))
    resident_bytes = read_memory().resident_bytes  # of all that the process has loaded, too
    return {
        "entries_taken": figure(first, "1/s", settings=settings),
        "entries_changed": figure(churn, "1/s", settings=settings),
        "memory": figure([float(resident_bytes)], "B", settings=settings),
        "heartbeats": figure(rounds, "s", settings={"workers": workers, "dense": workers // _DENSE_EVERY}),
        "memory_per_entry": figure([_entry_bytes(min(workers, 100), blocks)], "B", settings=settings),
        "question": figure(_question_s(), "s", settings={"blocks": PREFIX_BLOCKS}),
        "eviction": figure(_eviction_s(), "s", settings={"blocks": blocks}),
    }


def _rates(keeper: DirectoryKeeper, workers: int, blocks: int, number: int) -> Iterator[float]:
    """Entries per second, parsing included, of some reports at a time."""
    for begin in range(0, workers, _REPORTS_PER_SAMPLE):
        sent = [
            report_of(worker, blocks, number)
            for worker in range(begin, min(begin + _REPORTS_PER_SAMPLE, workers))
        ]
        payloads = [request.SerializeToString() for request in sent]
        began_s = perf_counter()
        for payload in payloads:
            assert keeper.take(control_pb2.HeartbeatRequest.FromString(payload))
        yield len(sent) * blocks / (perf_counter() - began_s)


def _rounds_s(workers: int) -> Iterator[float]:
    """Of answering one heartbeat of every member, from bytes to bytes; all loads change all the time."""
    clock = ManualClock()
    table = MembershipTable(_TERMS, clock)
    versions = [table.register(_registration(number)).version for number in range(workers)]
    for turn in range(_ROUNDS):
        clock.advance(_TERMS.heartbeat_ms / 1000)
        table.sweep()
        payloads = [
            control_pb2.HeartbeatRequest(
                worker_id=_name(number),
                epoch=number + 1,
                load=_load(turn),
                membership_version=version,
            ).SerializeToString()
            for number, version in enumerate(versions)
        ]
        began_s = perf_counter()
        for number, payload in enumerate(payloads):
            news = table.heartbeat(control_pb2.HeartbeatRequest.FromString(payload))
            control_pb2.HeartbeatResponse(membership=news).SerializeToString()
            versions[number] = news.version if news is not None else versions[number]
        yield perf_counter() - began_s


def _registration(number: int) -> control_pb2.RegisterRequest:
    role = inference_pb2.ROLE_ATTENTION if number % _DENSE_EVERY else inference_pb2.ROLE_DENSE
    member = inference_pb2.Member(
        worker_id=_name(number), role=role, epoch=number + 1, address=f"host-{number}:8700", load=_load(0)
    )
    return control_pb2.RegisterRequest(
        member=member,
        wire_version=WIRE_VERSION,
        layout_version=LAYOUT_VERSION,
        config_digest=_TERMS.config_digest,
    )


def _name(number: int) -> str:
    return f"worker-{number}"


def _load(turn: int) -> inference_pb2.Load:
    account = inference_pb2.BlockAccount(capacity=10**6, free=10**5 + turn, sealed_referenced=10**5)
    return inference_pb2.Load(blocks=account, sequences_running=100 + turn, busy_seconds=float(turn))


def report_of(worker: int, blocks: int, number: int) -> control_pb2.HeartbeatRequest:
    """A worker's first report names its blocks; a later one withdraws half of them, and names as many."""
    pool = control_pb2.PoolReport(number=number, starts_over=number == 1)
    kept = blocks if number == 1 else blocks // 2
    for block in range(kept):
        pool.published.add(hash=identity_of(worker, block, number), prefix_blocks=block + 1)
    if number > 1:
        pool.withdrawn.extend(identity_of(worker, block, number - 1) for block in range(blocks - kept))
    account = inference_pb2.BlockAccount(capacity=blocks)
    load = inference_pb2.Load(blocks=account)
    return control_pb2.HeartbeatRequest(
        worker_id=f"attention-{worker}", epoch=worker + 1, load=load, pool=pool
    )


def identity_of(worker: int, block: int, number: int) -> BlockHash:
    """Of a block that a worker's report of this number names."""
    return child(_ROOT, (worker, block, number))


def _entry_bytes(workers: int, blocks: int) -> float:
    """Memory of a directory over its entries, each held by one worker."""
    directory = Directory()
    gc.collect()
    tracemalloc.start()
    for worker in range(workers):
        directory.apply(read_report(report_of(worker, blocks, 1)))
    gc.collect()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / len(directory)


def _question_s() -> list[float]:
    """Finding a prefix that lies at one worker."""
    directory = Directory()
    directory.apply(read_report(report_of(0, PREFIX_BLOCKS, 1)))
    hashes = [identity_of(0, block, 1) for block in range(PREFIX_BLOCKS)]
    samples = []
    for _ in range(QUESTIONS):
        began_s = perf_counter()
        (run,) = directory.find(hashes)
        samples.append(perf_counter() - began_s)
        assert run.holders == (Life(WorkerId("attention-0"), Epoch(1)),)
    return samples


def _eviction_s() -> list[float]:
    """Giving up one cached block for a new one: what a reservation pays where nothing is evicted ahead."""
    count = 1000
    ledger = BlockLedger(count, Journal())
    samples = []
    for number in range(11):
        blocks = ledger.allocate(count)
        for index, block in enumerate(blocks):
            ledger.publish(block, identity_of(number, index, 1), index + 1)
        ledger.drop(blocks)
        began_s = perf_counter()
        evicting = ledger.allocate(count)
        samples.append((perf_counter() - began_s) / count)
        ledger.drop(evicting)
    return samples
