"""The command line's connection to a running controller."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

from anabranch.v1 import control_pb2, control_pb2_grpc
from cluster import config as configuration
from cluster import rpc
from cluster.errors import DeadlineExceeded, Unavailable
from controller.state import StateFolder

_ANSWER_S = 5.0
_LOOK_S = 0.2
_STOP_MARGIN_S = 30.0  # beyond the grace: Ray, and processes that have to be killed


class Control:
    """Calls to one controller. Errors are those of the tree: Unavailable when it does not answer."""

    def __init__(self, channel: grpc.Channel, process_id: int | None) -> None:
        self._stub = control_pb2_grpc.ControlServiceStub(channel)
        self._watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",  # its published stubs lack this method
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        self._process_id = process_id

    @classmethod
    @contextlib.contextmanager
    def open(cls, address: str | None, config_file: Path | None) -> Iterator[Control]:
        """Connect to an address, or to the cluster whose state folder the configuration names.

        Raises NotFound when no cluster is recorded there.
        """
        config = configuration.load(config_file)
        process_id = None
        if address is None:
            record = StateFolder.of(config).read()
            address, process_id = record.controller, record.process_id
        with rpc.channel(address, config.security.tls) as channel:
            yield cls(channel, process_id)

    def fleet(self) -> control_pb2.GetFleetResponse:
        """The fleet as the controller sees it."""
        try:
            return self._stub.GetFleet(control_pb2.GetFleetRequest(), timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error

    def drain(self, worker_id: str, grace_s: float) -> None:
        """Let one worker leave; returns when it has ended. Raises NotFound, InvalidRequest (the last one of
        its role), Unavailable when it had to be killed, so that what it held is recomputed.

        Where the controller supervises nobody, it has ended when this life of it is no member any more.
        """
        lives = _lives(self.fleet(), worker_id)
        request = control_pb2.DrainRequest(worker_id=worker_id, grace_ms=int(grace_s * 1000))
        try:
            self._stub.Drain(request, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise rpc.from_rpc(error) from error
        while True:
            fleet = self.fleet()
            slot = next((slot for slot in fleet.slots if slot.worker_id == worker_id), None)
            if slot.retired if slot is not None else lives.isdisjoint(_lives(fleet, worker_id)):
                break
            time.sleep(_LOOK_S)
        if slot is not None and (problem := slot.problem.partition(": ")[2]):
            raise Unavailable(f"{worker_id} {problem}: what it still held is recomputed")

    def shut_down(self, grace_s: float) -> None:
        """Stop the cluster; returns when its controller is gone. Raises DeadlineExceeded."""
        deadline_s = grace_s + _STOP_MARGIN_S
        with _process(self._process_id) as process:
            # The health stream ends with the server, wherever it runs; no need to ask again and again.
            watch = self._watch(health_pb2.HealthCheckRequest(), timeout=deadline_s)
            try:
                self._stub.Shutdown(
                    control_pb2.ShutdownRequest(grace_ms=int(grace_s * 1000)), timeout=_ANSWER_S
                )
            except grpc.RpcError as error:
                raise rpc.from_rpc(error) from error
            _await_end(watch)
            if process is not None and not select.select([process], [], [], deadline_s)[0]:
                raise DeadlineExceeded(f"process {self._process_id} still runs; look at its logs")


def _lives(fleet: control_pb2.GetFleetResponse, worker_id: str) -> set[int]:
    """Epochs of the members of a slot."""
    return {member.epoch for member in fleet.membership.members if member.slot == worker_id}


def _await_end(watch: Iterator[health_pb2.HealthCheckResponse]) -> None:
    try:
        for _status in watch:
            pass
    except grpc.RpcError as error:
        problem = rpc.from_rpc(error)
        if isinstance(problem, DeadlineExceeded):
            raise DeadlineExceeded("the cluster still drains; try again, or --now") from error


@contextlib.contextmanager
def _process(process_id: int | None) -> Iterator[int | None]:
    """A descriptor that becomes readable when the process ends; None if it is not of this machine."""
    if process_id is None:
        yield None
        return
    try:
        descriptor = os.pidfd_open(process_id)
    except (ProcessLookupError, AttributeError):  # gone already; not Linux
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
