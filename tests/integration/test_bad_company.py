"""Noise on every port, frozen workers, and roles that are told to stop: answers stay right, nothing dies."""

from __future__ import annotations

import random
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from anabranch import Client
from anabranch.v1 import inference_pb2
from tests.listening import tcp_ports, unix_sockets
from tests.models import random_prompt, reference_tokens, tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import Reader, whole
from workers.lanes.frames import TICKET_BYTES

pytestmark = pytest.mark.system  # many processes: minutes rather than seconds

ROLES = ("gateway", "dense", "attention")
TOKENS = 200
_END_S = 20.0
PROMPTS = [random_prompt(30 + 20 * index, seed=index) for index in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("model"), "llama", tokenizer=True)


@pytest.fixture(scope="module")
def expected(model: Path) -> Sequence[Sequence[int]]:
    """What transformers says after each prompt, up to the first near-tie."""
    references = reference_tokens(model, PROMPTS, TOKENS)
    return [reference.tokens[: reference.sharp_length()] for reference in references]


@pytest.fixture(scope="module")
def running(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """Two of each role; lanes over TCP first, so that every kind of port is open."""
    overrides = {
        "gateway.replicas": 2,
        "gateway.http_port": 0,
        "dense.replicas": 2,
        "attention.block_tokens": 8,
        "attention.lease_ms": 3000,
        "placement.shard_tokens": 32,
        "lanes.transports": ["tcp", "local", "grpc"],
        "telemetry.metrics_port": 0,
    }
    with process_cluster(model, tmp_path_factory.mktemp("run"), overrides) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: ProcessCluster, expected: Sequence[Sequence[int]]) -> Iterator[ProcessCluster]:
    """All six at work; after each test they still are, nothing is held and the next answers are right."""
    _await_six(running)
    yield running
    _await_six(running)
    running.assert_nothing_leaks(within_s=10)
    with running.client() as client:
        assert tuple(whole(client, token_ids=PROMPTS[0], max_tokens=8).token_ids()) == tuple(expected[0][:8])


def _await_six(cluster: ProcessCluster) -> None:
    ready = inference_pb2.MEMBER_STATE_READY
    cluster.wait(lambda members: [member.state for member in members] == [ready] * 6)


def _read_all(client: Client) -> list[Reader]:
    """A stream for each prompt, all under way."""
    readers = [Reader(client, token_ids=prompt, max_tokens=TOKENS) for prompt in PROMPTS]
    for reader in readers:
        reader.wait_tokens(10)
    return readers


def _assert_right(readers: Sequence[Reader], expected: Sequence[Sequence[int]]) -> None:
    for reader, reference in zip(readers, expected, strict=True):
        tokens = reader.result().token_ids()
        assert len(tokens) == TOKENS
        assert tuple(tokens[: len(reference)]) == tuple(reference)


def _say(connected: socket.socket, noise: bytes) -> None:
    """Send, and wait until the other side hangs up or has nothing to say; a broken pipe is an answer."""
    with connected:
        connected.settimeout(0.3)
        try:
            connected.sendall(noise)
            while connected.recv(4096):
                continue
        except OSError:
            return


def _noises() -> list[bytes]:
    """Random bytes; a wrong ticket with more behind it; protocols that belong elsewhere; a mere knock."""
    source = random.Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    return [
        source.randbytes(10_000),
        source.randbytes(TICKET_BYTES) + source.randbytes(500),
        source.randbytes(TICKET_BYTES - 1),
        preface + source.randbytes(2000),
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"",
    ]


def _make_noise(process_id: int) -> int:
    """Every noise on everything a process listens on; returns on how many places that was."""
    ports, paths = tcp_ports(process_id), unix_sockets(process_id)
    threads = []
    for noise in _noises():
        for port in ports:
            tcp = socket.create_connection(("127.0.0.1", port), timeout=5)
            threads.append(threading.Thread(target=_say, args=(tcp, noise)))
        for path in paths:
            local = socket.socket(socket.AF_UNIX)
            local.connect(path)
            threads.append(threading.Thread(target=_say, args=(local, noise)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return len(ports) + len(paths)


def test_noise_on_every_port_disturbs_nobody(
    cluster: ProcessCluster, expected: Sequence[Sequence[int]]
) -> None:
    """Nonsense on all ports and sockets of all roles while requests run: nobody ends, no token changes."""
    before = {worker_id: process.pid for worker_id, process in cluster.processes.items()}
    with cluster.client() as client:
        readers = _read_all(client)
        places = {worker_id: _make_noise(process_id) for worker_id, process_id in before.items()}
        _assert_right(readers, expected)
    # Gateway: gRPC, HTTP, metrics. Dense: gRPC, metrics. Attention: gRPC, metrics, lanes over TCP and unix.
    least = {"gateway": 3, "dense": 2, "attention": 4}
    assert all(places[worker_id] >= least[worker_id.split("-")[0]] for worker_id in places), places
    assert all(process.poll() is None for process in cluster.processes.values())


@pytest.mark.parametrize("role", ROLES)
def test_a_process_frozen_for_seconds_changes_no_token(
    cluster: ProcessCluster, expected: Sequence[Sequence[int]], role: str
) -> None:
    """SIGSTOP longer than lanes and leases wait, then SIGCONT: every request ends with its tokens, and the
    process, whether taken for dead or forgiven by a controller that was late itself, ends well.
    """
    process = cluster.processes[f"{role}-0"]
    with cluster.client() as client:
        readers = _read_all(client)
        process.send_signal(signal.SIGSTOP)
        try:
            threading.Event().wait(4.0)  # the fault itself: four seconds of silence
        finally:
            process.send_signal(signal.SIGCONT)
        _assert_right(readers, expected)
    process.send_signal(signal.SIGTERM)
    _replace(cluster, role)


@pytest.mark.parametrize("role", ROLES)
def test_sigterm_cuts_no_stream(
    cluster: ProcessCluster, expected: Sequence[Sequence[int]], role: str
) -> None:
    """One of two is told to stop while streams run: it ends with status 0, and every stream is whole."""
    with cluster.client() as client:
        readers = _read_all(client)
        cluster.processes[f"{role}-0"].send_signal(signal.SIGTERM)
        _assert_right(readers, expected)
    _replace(cluster, role)


def _replace(cluster: ProcessCluster, role: str) -> None:
    """Once the first of a role has ended well, start another in its place and wait for it."""
    name = f"{role}-0"
    process = cluster.processes[name]
    assert process.wait(_END_S) == 0, cluster.log(name)
    cluster.launch(role, 0)
    cluster.wait(lambda members: process.pid not in {member.process_id for member in members})
    _await_six(cluster)
