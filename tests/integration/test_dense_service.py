"""`DenseService` over real gRPC: one stream per gateway, from hello to the end."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from anabranch.v1 import dense_pb2, dense_pb2_grpc, types_pb2
from anabranch.wire import sequence_message
from cluster import rpc
from cluster.config import TlsConfig
from cluster.errors import AnabranchError, EngineFailed, Fenced, InvalidRequest, VersionMismatch
from cluster.sampling import SamplingParameters
from cluster.types import WIRE_VERSION, Epoch, SequenceKey, WorkerId
from tests.cluster_harness import WAIT_S, DenseCluster, Shape, counted, request, wait_until
from tests.dense_workers import dense_worker
from tests.models import random_prompt
from workers.dense.deltas import Delta
from workers.dense.service import GatewayStream
from workers.dense.worker import DenseWorker

PROMPT = random_prompt(40, 1)
WORKER = WorkerId("dense-0")
EPOCH = Epoch(0xDE)


@pytest.fixture(name="cluster", scope="module")
def _cluster(folder: Path) -> Iterator[DenseCluster]:
    """Two attention workers; the engine beside them stays idle."""
    shape = Shape(attention_workers=2, overrides={"attention": {"lease_ms": 1000}})
    with DenseCluster(folder, shape) as cluster:
        yield cluster


@pytest.fixture(name="worker")
def _worker(cluster: DenseCluster, folder: Path) -> Iterator[DenseWorker]:
    """A serving dense worker; afterwards no block may be held."""
    with dense_worker(cluster, folder, WORKER, EPOCH) as worker:
        yield worker
    cluster.wait_all_free()


class Gateway:
    """The other side of one stream: sends what a test says, keeps what comes."""

    def __init__(self, worker: DenseWorker, **hello: Any) -> None:
        self._requests: queue.SimpleQueue[dense_pb2.ServeRequest | None] = queue.SimpleQueue()
        self._channel = rpc.channel(f"127.0.0.1:{worker.port}", TlsConfig())
        self._changed = threading.Condition()
        self.deltas: list[dense_pb2.SequenceDelta] = []
        self.hello: dense_pb2.DenseHello | None = None
        self.error: AnabranchError | None = None
        self.is_over = False
        greeting: dict[str, Any] = {
            "gateway_id": "gateway-0",
            "gateway_epoch": 1,
            "wire_version": WIRE_VERSION,
        } | hello
        self.send(hello=dense_pb2.GatewayHello(**greeting))
        self._call = dense_pb2_grpc.DenseServiceStub(self._channel).Serve(iter(self._requests.get, None))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, **message: Any) -> None:
        """Send one message."""
        self._requests.put(dense_pb2.ServeRequest(**message))

    def submit(self, key: SequenceKey, **fields: Any) -> None:
        """Send a submission; what `fields` do not say is resolved sensibly."""
        submission: dict[str, Any] = {
            "sequence": sequence_message(key),
            "generation": 1,
            "prompt_token_ids": PROMPT,
            "sampling": sampling(),
        }
        self.send(submission=dense_pb2.Submission(**submission | fields))

    def wait(self, until: Callable[[], object]) -> None:
        """Until a condition on what came holds."""
        with self._changed:
            assert self._changed.wait_for(until, WAIT_S), (self.deltas, self.error)

    def tokens(self, request_id: str) -> list[int]:
        """The tokens of one sequence so far."""
        return [
            token
            for delta in self.deltas
            if delta.sequence.request_id == request_id
            for token in delta.token_ids
        ]

    def last(self) -> dense_pb2.SequenceDelta:
        """The newest delta."""
        return self.deltas[-1]

    def close(self) -> None:
        """Hang up."""
        self._call.cancel()
        self._thread.join(WAIT_S)
        self._channel.close()

    def _read(self) -> None:
        error: AnabranchError | None = None
        try:
            for response in self._call:
                with self._changed:
                    if response.HasField("hello"):
                        self.hello = response.hello
                    self.deltas += response.step.deltas
                    self._changed.notify_all()
        except grpc.RpcError as failure:
            error = rpc.from_rpc(failure)
        with self._changed:
            self.error, self.is_over = error, True
            self._changed.notify_all()


def sampling(**fields: Any) -> types_pb2.SamplingParameters:
    """Greedy, resolved."""
    resolved: dict[str, Any] = {"temperature": 0.0, "seed": 5, "max_tokens": 20, "ignore_eos": True}
    return types_pb2.SamplingParameters(**resolved | fields)


def gateway(worker: DenseWorker, **hello: Any) -> contextlib.closing[Gateway]:
    """A gateway for `with`."""
    return contextlib.closing(Gateway(worker, **hello))


def test_a_stream_brings_tokens_timings_and_the_end(worker: DenseWorker, cluster: DenseCluster) -> None:
    """Hello is answered with who serves; a submission's tokens come in order, with map, reason and timings,
    and are those the engine gives directly.
    """
    (expected,) = cluster.generate([request(PROMPT, 20)])
    key = SequenceKey("served")
    with gateway(worker, believed=types_pb2.Believed(epoch=EPOCH)) as client:
        client.submit(key, sampling=sampling(logprobs=2))
        client.wait(lambda: client.deltas and client.last().finish_reason)
        assert client.hello is not None
        assert client.hello.responder.epoch == EPOCH
        assert client.hello.model_digest == cluster.decoder.spec.digest
        assert client.tokens("served") == expected.token_ids
        firsts = [delta.first_index for delta in client.deltas if delta.token_ids]
        assert firsts == list(range(20))
        assert client.deltas[0].HasField("shard_map")
        running = [delta.timings for delta in client.deltas if delta.token_ids]
        assert all(timings.prefill_seconds > 0 and timings.dense_seconds > 0 for timings in running)
        assert running == sorted(running, key=lambda timings: timings.decode_seconds)
        last = client.last()
        assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert last.timings.prefill_seconds > 0
        assert last.timings.decode_seconds > 0
        assert len(last.logprobs) == 1
        assert len(last.logprobs[0].alternatives) == 2
        client.send(acknowledge=dense_pb2.Acknowledge(sequence=sequence_message(key), generation=1))
        cluster.wait_all_free()


def test_a_worker_reports_how_long_it_has_computed(worker: DenseWorker, cluster: DenseCluster) -> None:
    """`busy_seconds` of its load grows with its steps, and is what its metrics say of the dense side."""
    before_s = worker.load().busy_seconds
    with gateway(worker) as client:
        client.submit(SequenceKey("busy"), sampling=sampling())
        client.wait(lambda: client.deltas and client.last().finish_reason)
        client.send(
            acknowledge=dense_pb2.Acknowledge(sequence=sequence_message(SequenceKey("busy")), generation=1)
        )
        cluster.wait_all_free()
    labels = {"side": "dense", "state": "computed"}
    series = "anabranch_dense_side_seconds_total"
    assert worker.load().busy_seconds > before_s
    assert worker.load().busy_seconds == worker.engine.metrics.registry.get_sample_value(series, labels)


def test_abort_and_hang_up(worker: DenseWorker, cluster: DenseCluster) -> None:
    """An abort frees; a gateway that hangs up leaves its sequences as orphans, which stop stepping."""
    with gateway(worker) as client:
        client.submit(SequenceKey("aborted"), sampling=sampling(max_tokens=400))
        client.wait(lambda: len(client.tokens("aborted")) > 3)
        client.send(
            abort=dense_pb2.AbortSequence(sequence=types_pb2.SequenceKey(request_id="aborted"), generation=1)
        )
        cluster.wait_all_free(within_s=1.0)
        client.submit(SequenceKey("left"), sampling=sampling(max_tokens=400))
        client.wait(lambda: len(client.tokens("left")) > 3)
    wait_until(lambda: worker.engine.sequences_running == 0)
    assert not worker.engine.is_idle()
    with gateway(worker) as client:
        client.submit(
            SequenceKey("left"),
            generation=2,
            output_token_ids=[1, 2, 3],
            sampling=sampling(max_tokens=400),
        )
        client.send(
            abort=dense_pb2.AbortSequence(sequence=types_pb2.SequenceKey(request_id="left"), generation=2)
        )
        cluster.wait_all_free()


@pytest.mark.parametrize(
    ("hello", "kind"),
    [
        ({"wire_version": WIRE_VERSION + 1}, VersionMismatch),
        ({"believed": types_pb2.Believed(epoch=EPOCH + 2)}, Fenced),
    ],
    ids=["wire version", "epoch"],
)
def test_a_hello_that_does_not_agree_is_refused(
    hello: dict[str, Any], kind: type[AnabranchError], worker: DenseWorker
) -> None:
    """Another wire version and another epoch end the stream by name."""
    with gateway(worker, **hello) as client:
        client.wait(lambda: client.is_over)
        assert type(client.error) is kind


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"prompt_token_ids": []}, "prompt"),
        ({"prompt_token_ids": [10**6]}, "vocabulary"),
        ({"sampling": sampling(max_tokens=500)}, "512"),
        ({"sampling": sampling(temperature=-1.0)}, "temperature"),
        ({"sampling": types_pb2.SamplingParameters(max_tokens=5)}, "seed"),
        ({"generation": 0}, "generation"),
        ({"generation": 2**16}, "generation"),
    ],
)
def test_a_bad_submission_fails_alone(fields: dict[str, Any], word: str, worker: DenseWorker) -> None:
    """What cannot be served is answered INVALID_ARGUMENT with the reason; the stream and others go on."""
    with gateway(worker) as client:
        client.submit(SequenceKey("bad"), **fields)
        client.wait(lambda: client.deltas)
        failure = client.last().failure
        assert isinstance(rpc.from_code(failure.code, failure.reason, failure.message), InvalidRequest)
        assert word in failure.message
        good = request(PROMPT).key
        client.submit(good, sampling=sampling(max_tokens=2))
        client.wait(lambda: client.last().finish_reason)
        client.send(acknowledge=dense_pb2.Acknowledge(sequence=sequence_message(good), generation=1))


def test_draining_hands_over_and_is_seen_by_health_checks(worker: DenseWorker, cluster: DenseCluster) -> None:
    """A drained worker is not ready, gives its sequences back with `handoff` and ends the stream cleanly."""
    with gateway(worker) as client, rpc.channel(f"127.0.0.1:{worker.port}", TlsConfig()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its stubs say nothing of its methods
        service = health_pb2.HealthCheckRequest(service="anabranch.v1.DenseService")
        assert health.Check(service).status == health_pb2.HealthCheckResponse.SERVING
        client.submit(SequenceKey("handed"), sampling=sampling(max_tokens=400))
        client.wait(lambda: len(client.tokens("handed")) > 3)
        worker.drain()
        client.wait(lambda: client.is_over)
        assert client.last().handoff
        assert health.Check(service).status == health_pb2.HealthCheckResponse.NOT_SERVING
    cluster.wait_all_free()  # nobody came for it: its lease ends


def test_an_engine_that_fails_ends_every_stream_by_name(
    worker: DenseWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle streams too, without a word of their sequences, which others take over; a new one is refused."""

    def fail() -> bool:
        raise ValueError("of all things")

    with gateway(worker) as client, gateway(worker) as idle:
        idle.wait(lambda: idle.hello)
        client.submit(SequenceKey("undecided"), sampling=sampling(max_tokens=400))
        client.wait(lambda: len(client.tokens("undecided")) > 3)
        monkeypatch.setattr(worker.engine, "turn", fail)
        client.wait(lambda: client.is_over)
        idle.wait(lambda: idle.is_over)
        for stream in (client, idle):
            assert type(stream.error) is EngineFailed
            assert "dense-0 failed: ValueError" in stream.error.message
        assert not client.last().HasField("failure")
        assert not client.last().handoff
    with gateway(worker) as late:
        late.wait(lambda: late.is_over)
        assert type(late.error) is EngineFailed


def test_a_submission_handed_over_after_its_stream_is_an_orphan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway dies just after it sent a submission, and the engine hears of the stream's end first: the
    sequence is nobody's, takes no steps, and its blocks are left to their leases, not held for ever.
    """
    overrides = {"dense": {"orphan_grace_ms": 200}, "attention": {"lease_ms": 400}}
    with (
        DenseCluster(folder, Shape(attention_workers=1, overrides=overrides)) as cluster,
        dense_worker(cluster, folder, WORKER, EPOCH) as worker,
    ):
        engine, arrived, is_over, is_late = worker.engine, *(threading.Event() for _ in range(3))
        submit, disconnect = engine.submit, engine.disconnect

        def submit_late(*arguments: Any) -> None:
            arrived.set()
            assert is_over.wait(WAIT_S)
            submit(*arguments)
            engine.hand_over([], None, lambda _nothing: is_late.set())  # once the engine took it in

        def note_end(stream: GatewayStream) -> None:
            disconnect(stream)
            is_over.set()

        monkeypatch.setattr(engine, "submit", submit_late)
        monkeypatch.setattr(engine, "disconnect", note_end)
        with gateway(worker) as client:
            client.submit(SequenceKey("late"), sampling=sampling(max_tokens=400))
            assert arrived.wait(WAIT_S)
        assert is_late.wait(WAIT_S)
        wait_until(engine.is_idle)
        cluster.wait_all_free(within_s=5.0)
        assert counted(engine, "anabranch_dense_tokens_sampled") < 400


def test_a_gateway_that_does_not_read_is_cut_off() -> None:
    """The engine never waits: a stream whose queue is full is closed, and what comes later is dropped."""
    stream = GatewayStream("slow")
    delta = Delta(SequenceKey("any"), 1, 0)
    for step in range(10_000):
        stream.deliver(step, [delta])
    assert list(stream.messages()) == []


def test_parameters_travel_whole() -> None:
    """Every sampling field has a place in the proto; a field added to one side only is noticed here."""
    ours = set(SamplingParameters.__dataclass_fields__)
    theirs = {field.name for field in types_pb2.SamplingParameters.DESCRIPTOR.fields}
    assert ours == theirs
