"""Numbers of pods at Kubernetes: of StatefulSets, or of worker groups of one RayCluster.

The one translator of the `kubernetes` client's errors into the tree: Fenced for 409 (the object has
changed); PermissionDenied for 401 and 403; NotFound for 404; Unavailable for whatever did not answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import urllib3
from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException

from cluster.clock import Clock, monotonic
from cluster.errors import AnabranchError, Fenced, NotFound, PermissionDenied, Unavailable
from cluster.policies.autoscaler import Scaled

_CALL_S = 10.0
_WATCH_S = 60.0
"""A watch of a connection that died silently is begun anew after so long."""
_PAUSE_S = 1.0
"""Between two watches, of which Kubernetes ended the first."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How many pods a role should have, and the version of the object that said so."""

    count: int
    version: str


class Workloads(Protocol):
    """Where the pods of roles come from. Every call raises what the module's docstring lists."""

    def scale(self, role: Scaled) -> Scale:
        """What is asked for now."""
        ...

    def victims(self, role: Scaled, seen: Scale, count: int, idle_first: Sequence[str], /) -> Sequence[str]:
        """The pods that leave when there are fewer. `idle_first`: those with the least to lose first."""
        ...

    def resize(self, role: Scaled, seen: Scale, count: int, victims: Sequence[str], /) -> None:
        """Ask for another number, unless the object changed since it was seen. Kubernetes tells the victims
        to end; they drain, and leave when their work is elsewhere.
        """
        ...

    def await_settled(self, role: Scaled, within_s: float, stop: threading.Event, /) -> bool:
        """Wait until victims have left and newcomers serve; False when it took longer, or is to stop."""
        ...


class StatefulSets:
    """A StatefulSet per role, changed through its subresource `scale`: the least of all rights."""

    def __init__(
        self, api: client.ApiClient, namespace: str, names: Mapping[Scaled, str], clock: Clock = monotonic
    ) -> None:
        self._sets = client.AppsV1Api(api)
        self._namespace = namespace
        self._names = names
        self._clock = clock

    def scale(self, role: Scaled) -> Scale:
        """See Workloads."""
        name = self._names[role]
        with _translated(f"statefulset/{name}"):
            found = self._sets.read_namespaced_stateful_set_scale(
                name, self._namespace, _request_timeout=_CALL_S
            )
        return Scale(found.spec.replicas or 0, found.metadata.resource_version)

    def victims(self, role: Scaled, seen: Scale, count: int, _idle_first: Sequence[str]) -> Sequence[str]:
        """See Workloads. The highest ordinals, whatever they hold: Kubernetes has no other way."""
        return [f"{self._names[role]}-{ordinal}" for ordinal in reversed(range(count, seen.count))]

    def resize(self, role: Scaled, seen: Scale, count: int, _victims: Sequence[str]) -> None:
        """See Workloads."""
        name = self._names[role]
        body = {"metadata": {"resourceVersion": seen.version}, "spec": {"replicas": count}}
        with _translated(f"statefulset/{name}"):
            self._sets.patch_namespaced_stateful_set_scale(
                name, self._namespace, body, _request_timeout=_CALL_S
            )

    def await_settled(self, role: Scaled, within_s: float, stop: threading.Event) -> bool:
        """See Workloads."""
        name, listing = self._names[role], self._sets.list_namespaced_stateful_set
        with _translated(f"statefulset/{name}"):
            return _await(
                _Watched(listing, (self._namespace,), name, _set_is_settled), within_s, stop, self._clock
            )


class RayWorkerGroups:
    """Worker groups of one RayCluster, named as their roles; KubeRay ends the pods that it is told to."""

    def __init__(self, api: client.ApiClient, namespace: str, name: str, clock: Clock = monotonic) -> None:
        self._objects = client.CustomObjectsApi(api)
        self._place = ("ray.io", "v1", namespace, "rayclusters")
        self._name = name
        self._clock = clock

    def scale(self, role: Scaled) -> Scale:
        """See Workloads."""
        found = self._read()
        return Scale(_group(found, role)[1]["replicas"], found["metadata"]["resourceVersion"])

    def victims(self, _role: Scaled, seen: Scale, count: int, idle_first: Sequence[str]) -> Sequence[str]:
        """See Workloads. Those with the least to lose."""
        return idle_first[: max(0, seen.count - count)]

    def resize(self, role: Scaled, seen: Scale, count: int, victims: Sequence[str]) -> None:
        """See Workloads."""
        position, _ = _group(self._read(), role)
        path = f"/spec/workerGroupSpecs/{position}"
        body = [
            # Not the version: each pod that comes or goes makes another, also while the victim drains.
            {"op": "test", "path": f"{path}/replicas", "value": seen.count},
            {"op": "replace", "path": f"{path}/replicas", "value": count},
            {"op": "add", "path": f"{path}/scaleStrategy", "value": {"workersToDelete": list(victims)}},
        ]
        with _translated(f"raycluster/{self._name}"):
            self._objects.patch_namespaced_custom_object(
                *self._place, self._name, body, _request_timeout=_CALL_S
            )

    def await_settled(self, _role: Scaled, within_s: float, stop: threading.Event) -> bool:
        """See Workloads. Of all groups together, which is how KubeRay tells it."""
        listing = self._objects.list_namespaced_custom_object
        with _translated(f"raycluster/{self._name}"):
            return _await(
                _Watched(listing, self._place, self._name, _cluster_is_settled), within_s, stop, self._clock
            )

    def _read(self) -> dict[str, Any]:
        with _translated(f"raycluster/{self._name}"):
            found = self._objects.get_namespaced_custom_object(
                *self._place, self._name, _request_timeout=_CALL_S
            )
            return dict(found)


def _group(cluster: Mapping[str, Any], role: Scaled) -> tuple[int, dict[str, Any]]:
    groups = enumerate(cluster["spec"].get("workerGroupSpecs", ()))
    found = next(((position, each) for position, each in groups if each["groupName"] == role), None)
    if found is None:
        raise NotFound(f"the RayCluster has no worker group {role}")
    return found


def _set_is_settled(found: Mapping[str, Any]) -> bool:
    count, status = found["spec"]["replicas"], found.get("status", {})
    is_seen = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
    return bool(is_seen and status.get("replicas", 0) == status.get("readyReplicas", 0) == count)


def _cluster_is_settled(found: Mapping[str, Any]) -> bool:
    status = found.get("status", {})
    is_seen = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
    return bool(is_seen and status.get("readyWorkerReplicas", 0) == status.get("desiredWorkerReplicas", 0))


@dataclass(frozen=True, slots=True)
class _Watched:
    """One object, how it is listed, and when it is settled."""

    listing: Callable[..., Any]
    place: tuple[str, ...]
    name: str
    is_settled: Callable[[Mapping[str, Any]], bool]


def _await(watched: _Watched, within_s: float, stop: threading.Event, clock: Clock) -> bool:
    """Follow an object until it is settled. A watch that ends is begun anew, from how the object is then."""
    end_s = clock() + within_s
    while (left_s := end_s - clock()) > 0 and not stop.is_set():
        events = watch.Watch().stream(
            watched.listing,
            *watched.place,
            field_selector=f"metadata.name={watched.name}",
            timeout_seconds=max(1, int(min(left_s, _WATCH_S))),
            _request_timeout=(_CALL_S, _WATCH_S + _CALL_S),
        )
        with contextlib.closing(events):
            if any(stop.is_set() or watched.is_settled(event["raw_object"]) for event in events):
                return not stop.is_set()
        stop.wait(_PAUSE_S)
    return False


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except ApiException as error:
        raise _error_of(what, error) from error
    except urllib3.exceptions.HTTPError as error:
        raise Unavailable(f"Kubernetes does not answer about {what}: {error}") from error


def _error_of(what: str, error: ApiException) -> AnabranchError:
    said = f"{what}: Kubernetes answered {error.status} {error.reason}"
    if error.status in (409, 422):  # 422: a patch whose test failed
        return Fenced(f"{said}: it was changed meanwhile")
    if error.status in (401, 403):
        return PermissionDenied(f"{said}: give the service account the Role that the chart makes")
    if error.status == 404:
        return NotFound(said)
    return Unavailable(said)
