"""An attention worker from outside: its process under a membership, its health, metrics and manners."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import CollectorRegistry

from anabranch.v1 import control_pb2, inference_pb2
from anabranch.wire import geometry_message
from cluster import rpc
from cluster.config import Config, TierConfig
from cluster.errors import ConfigError, Unavailable
from cluster.types import LAYOUT_VERSION, WIRE_VERSION, Epoch, WorkerId, draw_epoch
from controller.membership import MembershipTable, Terms
from controller.service import ControlServer, ControlService
from tests.attention_pool import Pool
from tests.attention_worker import (
    BLOCKS,
    EPOCH,
    GEOMETRY,
    DenseSide,
    SmallSequence,
    assert_attended,
    caller,
    config,
    host_of,
    serving,
    wait_until,
)
from workers.attention.core import AttentionCore
from workers.attention.metrics import AttentionMetrics
from workers.lanes.dial import dial

torch.set_num_threads(1)

SERVICES = ("anabranch.v1.AttentionService", "anabranch.v1.KvService")


@dataclass
class RunningWorker:
    """`python -m workers.attention` and the membership it joined."""

    process: subprocess.Popen[bytes]
    table: MembershipTable
    log: Path

    def member(self) -> inference_pb2.Member:
        """The worker as the membership shows it now; an empty one before it joined."""
        assert self.process.poll() in (None, 0), self.log.read_text()
        members = {member.worker_id: member for member in self.table.membership().members}
        return members.get("attention-0", inference_pb2.Member())

    def wait_for(self, state: inference_pb2.MemberState.ValueType) -> inference_pb2.Member:
        """Wait until it says that it is in `state`."""
        wait_until(lambda: self.member().state == state, timeout_s=60)
        return self.member()


@contextmanager
def running(folder: Path, settings: Config) -> Iterator[RunningWorker]:
    """A worker's process, in a cluster that has a dense worker; killed at the end if it still runs."""
    terms = Terms(settings.digest, settings.controller.heartbeat_ms, settings.controller.expiry_ms)
    table = MembershipTable(terms, on_change=lambda *_: None)
    table.register(
        control_pb2.RegisterRequest(
            member=inference_pb2.Member(
                worker_id="dense-0", epoch=1, role=inference_pb2.ROLE_DENSE, address="127.0.0.1:1"
            ),
            wire_version=WIRE_VERSION,
            layout_version=LAYOUT_VERSION,
            config_digest=settings.digest,
        )
    )
    service = ControlService(table, draw_epoch(), geometry_message(GEOMETRY), lambda: (), lambda _: None)
    server = ControlServer(settings, service)
    file, log = folder / "cluster.yaml", folder / "worker.log"
    file.write_text(settings.to_yaml())
    command = [sys.executable, "-m", "workers.attention", "--config", str(file)]
    command += ["--worker-id", "attention-0", "--controller", f"127.0.0.1:{server.port}"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield RunningWorker(process, table, log)
        finally:
            process.kill()
            process.wait()
            server.stop()


def settings_of_process(**controller: object) -> Config:
    """Frequent heartbeats, and a free port for the controller."""
    changes = {"port": 0, "heartbeat_ms": 50, "expiry_ms": 5000, **controller}
    settings = config()
    return settings.model_copy(update={"controller": settings.controller.model_copy(update=changes)})


def test_a_process_joins_serves_drains_and_leaves(tmp_path: Path) -> None:
    """It learns the geometry by registering, reports its blocks, serves lanes; told to stop, it admits
    nobody, lets what it holds go on, and ends with 0 once that has left.
    """
    with running(tmp_path, settings_of_process(drain_grace_s=60)) as worker:
        member = worker.wait_for(inference_pb2.MEMBER_STATE_READY)
        epoch = Epoch(member.epoch)
        with rpc.channel(member.address, config().security.tls) as channel:
            pool, sequence = Pool(channel, epoch), SmallSequence(1)
            shard = pool.reserve(sequence, 0, 40)
            held = GEOMETRY.blocks_for(40)
            wait_until(lambda: worker.member().load.blocks.free == BLOCKS - held)
            assert worker.member().load.resident_bytes > 0
            dense = DenseSide(dial(channel, member.address, epoch, caller()))
            dense.step([(sequence, sequence.row(shard, 0, 9))])
            worker.process.send_signal(signal.SIGTERM)
            worker.wait_for(inference_pb2.MEMBER_STATE_DRAINING)
            part = (sequence, sequence.row(shard, 9, 1))
            assert_attended(dense.step([part]), [part])
            dense.lane.close()
            with pytest.raises(Unavailable):
                pool.reserve(SmallSequence(2), 0, 4)
            pool.release(sequence)
        assert worker.process.wait(30) == 0, worker.log.read_text()


def test_a_process_does_not_wait_for_ever_for_what_it_holds(tmp_path: Path) -> None:
    """After the grace period it leaves although a sequence is still here."""
    with running(tmp_path, settings_of_process(drain_grace_s=0.2)) as worker:
        member = worker.wait_for(inference_pb2.MEMBER_STATE_READY)
        with rpc.channel(member.address, config().security.tls) as channel:
            Pool(channel, Epoch(member.epoch)).reserve(SmallSequence(1), 0, 40)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(30) == 0, worker.log.read_text()


def test_a_process_holds_nothing_for_nobody(tmp_path: Path) -> None:
    """Told to stop, it leaves as soon as no gateway and no dense worker is a member, whatever it holds and
    however long the grace and the leases are.
    """
    with running(tmp_path, settings_of_process(drain_grace_s=60)) as worker:
        member = worker.wait_for(inference_pb2.MEMBER_STATE_READY)
        with rpc.channel(member.address, config().security.tls) as channel:
            Pool(channel, Epoch(member.epoch)).reserve(SmallSequence(1), 0, 40)
        worker.process.send_signal(signal.SIGTERM)
        worker.wait_for(inference_pb2.MEMBER_STATE_DRAINING)
        worker.table.remove("dense-0")
        assert worker.process.wait(30) == 0, worker.log.read_text()


def _health(channel: grpc.Channel, service: str) -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return int(check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)


def _services(channel: grpc.Channel) -> set[str]:
    ask = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="*")]), timeout=10)
    return {service.name for service in answer.list_services_response.service}


def test_health_and_reflection() -> None:
    """A serving worker is alive and ready, a draining one alive only; its services can be listed."""
    with serving() as worker, host_of(worker) as host:
        for service in ("", *SERVICES):
            assert _health(host.channel, service) == health_pb2.HealthCheckResponse.SERVING
        worker.drain()
        assert _health(host.channel, "") == health_pb2.HealthCheckResponse.SERVING
        for service in SERVICES:
            assert _health(host.channel, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert _services(host.channel) >= {*SERVICES, "grpc.health.v1.Health"}


def value(metrics: CollectorRegistry, name: str, **labels: str) -> float | None:
    """What the worker says of its arena."""
    return metrics.get_sample_value(f"anabranch_attention_{name}", {"arena": "attention-0", **labels})


def sent_bytes(metrics: CollectorRegistry) -> float | None:
    """What the worker says its lanes sent."""
    return value(metrics, "lane_bytes_total", direction="sent")


def test_metrics_add_up() -> None:
    """Blocks by state sum to the arena; lanes, their bytes and the busy time are what happened."""
    with serving() as worker, host_of(worker) as host:
        metrics = CollectorRegistry()
        metrics.register(AttentionMetrics([worker]))
        sequence = SmallSequence(1)
        lane = host.open_lane()
        shard = Pool(host.channel).reserve(sequence, 0, 40)
        DenseSide(lane).step([(sequence, sequence.row(shard, 0, 9))])
        states = ("free", "reserved", "open", "sealed_referenced", "sealed_cached")
        blocks = [value(metrics, "blocks", state=name) for name in states]
        assert sum(count or 0 for count in blocks) == BLOCKS
        assert value(metrics, "lanes") == 1
        assert value(metrics, "leases_expired_total") == 0
        # A reply may be here before its sender has counted it.
        wait_until(lambda: sent_bytes(metrics) == lane.bytes_received)
        busy = value(metrics, "busy_seconds_total")
        assert busy is not None
        assert worker.load().busy_seconds == busy > 0


def test_lanes_take_turns() -> None:
    """A decoding row is answered while another lane's long chunk is still being attended."""
    # The reference kernel makes a slice slow enough for the order of answers to be certain.
    with serving(config(kernel="reference", slice_rows=1)) as worker, host_of(worker) as host:
        long, short = SmallSequence(1, 60), SmallSequence(2)
        pool = Pool(host.channel)
        shards = pool.reserve(long, 0, 60), pool.reserve(short, 0, 8)
        busy, quick = DenseSide(host.open_lane()), DenseSide(host.open_lane())
        busy.step([(long, long.row(shards[0], 0, 10))])
        quick.step([(short, short.row(shards[1], 0, 1))])
        order: list[str] = []
        begun = threading.Event()

        def attend_long() -> None:
            busy.step_number += 1
            busy.lane.send(busy.message([(long, long.row(shards[0], 10, 50))], 0))
            begun.set()
            busy.receive(0)
            order.append("long")

        thread = threading.Thread(target=attend_long)
        thread.start()
        assert begun.wait(10)
        quick.step([(short, short.row(shards[1], 1, 1))], layers=[0])
        order.append("short")
        thread.join(30)
        assert order == ["short", "long"]


def test_heartbeats_do_not_wait_for_attention() -> None:
    """While a computation holds the store, the load can still be told."""
    with serving() as worker:
        loads: list[inference_pb2.Load] = []
        thread = threading.Thread(target=lambda: loads.append(worker.load()))
        with worker.core.store.turns:
            thread.start()
            thread.join(10)
            assert loads
            assert loads[0].blocks.capacity == BLOCKS


def test_an_arena_too_small_is_refused_by_name() -> None:
    """An arena that cannot hold one block says how large a block is."""
    small = TierConfig(arena=GEOMETRY.block_bytes - 1)
    with pytest.raises(ConfigError, match=str(GEOMETRY.block_bytes)):
        AttentionCore(config().attention, small, GEOMETRY, WorkerId("attention-0"), EPOCH)


def test_untouched_blocks_cost_no_memory() -> None:
    """A large arena takes address space only; pages come with the first write."""
    status = Path("/proc/self/status")

    def resident_kib() -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmRSS" in line)

    before, large = resident_kib(), TierConfig(arena=2**31)
    with AttentionCore(config().attention, large, GEOMETRY, WorkerId("attention-0"), EPOCH) as core:
        assert core.store.audit().capacity * GEOMETRY.block_bytes > 2**30
        assert resident_kib() - before < 2**18


def test_the_worker_serves_its_metrics_over_http(tmp_path: Path) -> None:
    """With telemetry.metrics_port set, a process answers Prometheus, and the membership says where."""
    settings = settings_of_process()
    settings = settings.model_copy(
        update={"telemetry": settings.telemetry.model_copy(update={"metrics_port": 0})}
    )
    with running(tmp_path, settings) as worker:
        address = worker.wait_for(inference_pb2.MEMBER_STATE_READY).metrics_address
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            assert b'anabranch_attention_blocks{arena="attention-0",state="free"} 32.0' in answer.read()
