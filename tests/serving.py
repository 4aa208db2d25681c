"""What tests of a running `ProcessCluster` share: raw calls, whole answers, ports, and waiting."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, cast

import grpc
import httpx

from anabranch import Client
from anabranch.events import Event
from anabranch.v1 import inference_pb2, inference_pb2_grpc
from cluster import rpc
from tests.client_reading import Reading
from tests.processes import ProcessCluster

WAIT_S = 20.0


@contextmanager
def raw_channel(cluster: ProcessCluster) -> Iterator[grpc.Channel]:
    """A channel to the first gateway, with nothing of the client library."""
    address = next(m.address for m in cluster.members() if m.role == inference_pb2.ROLE_GATEWAY)
    with rpc.channel(address, cluster.config.security.tls) as channel:
        yield channel


def status_of(
    channel: grpc.Channel, request: inference_pb2.GenerateRequest, timeout_s: float = WAIT_S
) -> tuple[str, str]:
    """(status name, message) a Generate call ends with."""
    return ending(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=timeout_s))


def ending(responses: Any) -> tuple[str, str]:
    """(status name, message) of a call, read to its end."""
    try:
        for _ in responses:
            pass
    except grpc.RpcError as error:
        call = cast(grpc.Call, error)
        return call.code().name, call.details() or ""
    return "OK", ""


def whole(client: Client, **arguments: Any) -> Reading:
    """A generation of the client library, read to its end; greedy and past end tokens unless told else."""
    options = {"temperature": 0.0, "ignore_eos": True, **arguments}
    return Reading(list(client.generate(**options)))


def http_client(cluster: ProcessCluster, worker_id: str = "gateway-0") -> httpx.Client:
    """A client of the HTTP port a gateway drew, which its log names."""
    lines = (cluster.folder / f"{worker_id}.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    port = next(event["http_port"] for event in events if event["event"] == "gateway_serving")
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT_S)


def wait_until(condition: Callable[[], bool], within_s: float = WAIT_S) -> None:
    """Look again and again, yielding the processor; raises AssertionError when the time is over."""
    end_s = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end_s, f"not so within {within_s} s"
        pause.wait(0.01)


class Reader:
    """Reads a generation on a thread of its own, so that a test can act in the middle of it."""

    def __init__(self, client: Client, **arguments: Any) -> None:
        options = {"temperature": 0.0, "ignore_eos": True, **arguments}
        self._stream = client.generate(**options)
        self._so_far: list[Event] = []
        self._done: Future[Reading] = Future()
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    @property
    def request_id(self) -> str:
        """Of the request being read."""
        return self._stream.request_id

    def wait_tokens(self, count: int) -> None:
        """Until so many tokens came, or the stream is over."""
        wait_until(lambda: self._done.done() or len(Reading(list(self._so_far)).token_ids()) >= count)

    @property
    def has_begun(self) -> bool:
        """Whether a token came."""
        return len(Reading(list(self._so_far)).token_ids()) > 0

    def result(self, within_s: float = 60.0) -> Reading:
        """What was read. Raises what the stream ended with."""
        return self._done.result(within_s)

    @property
    def is_over(self) -> bool:
        """Whether the stream ended, well or not."""
        return self._done.done()

    def cancel(self) -> None:
        """Hang up."""
        self._stream.cancel()

    def _read(self) -> None:
        try:
            for event in self._stream:
                self._so_far.append(event)
        except Exception as error:  # noqa: BLE001  the test's thread raises it
            self._done.set_exception(error)
        else:
            self._done.set_result(Reading(self._so_far, self._stream.resumes))
