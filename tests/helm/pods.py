"""Pods of a rendered release as local processes, each as the kubelet would start, ask and end it.

Every pod has a network, a mount namespace and a host name of its own, a read-only root in which only declared
volumes may be written, the declared user, and no capability. Processes share the machine's process numbers.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from cluster.health import HEALTH_CHECK
from tests.helm.charts import NAMESPACE, ROOT, Manifest, config_files, selects
from tests.system.hosts import Host

_STARTED_S = 90.0
_LOOK_S = 0.1

# $1 is the new root, $2 the user, then SOURCE:PLACE:ro|rw up to --, then the command. What an image would
# hold is bound from this machine: system, interpreter, checkout.
_ENTER = r"""
set -e
root=$1; user=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
for folder in bin sbin lib lib64 usr; do
  if [ -L "/$folder" ]; then cp -a "/$folder" "$root/$folder"
  elif [ -d "/$folder" ]; then mkdir "$root/$folder"; mount --rbind "/$folder" "$root/$folder"; fi
done
mkdir -p "$root/proc" "$root/dev" "$root/sys"
mount --rbind /proc "$root/proc"; mount --rbind /dev "$root/dev"
cp -a /etc "$root/etc"
while [ "$1" != -- ]; do
  IFS=: read -r source place mode <<<"$1"; shift
  [ ! -d "$source" ] || mkdir -p "$root$place"
  mount --bind "$source" "$root$place"
  [ "$mode" = rw ] || mount -o remount,bind,ro "$root$place"
done
shift
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --clear-groups --bounding-set -all \
  --inh-caps -all --no-new-privs "$@"
"""


@dataclass(frozen=True)
class Pod:
    """One pod: its specification, its name, its ordinal, and the host that stands for its network."""

    name: str
    index: int
    manifest: Manifest
    host: Host

    @property
    def container(self) -> Manifest:
        """Its only container."""
        (container,) = self.manifest["spec"]["containers"]
        return dict(container)

    @property
    def role(self) -> str:
        """Which component of the release it is."""
        return str(self.manifest["metadata"]["labels"]["app.kubernetes.io/component"])

    @property
    def grace_s(self) -> int:
        """What it gets from preStop to SIGKILL."""
        return int(self.manifest["spec"]["terminationGracePeriodSeconds"])

    def port(self, name: str) -> int:
        """The number of one of its ports."""
        return next(int(port["containerPort"]) for port in self.container["ports"] if port["name"] == name)

    def environment(self) -> dict[str, str]:
        """Its variables, references resolved as the kubelet does."""
        fields = {
            "metadata.name": self.name,
            "metadata.labels['apps.kubernetes.io/pod-index']": str(self.index),
        }
        return {
            each["name"]: each["value"]
            if "value" in each
            else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            for each in self.container["env"]
        }

    def command(self) -> list[str]:
        """Its command with $(NAME) replaced."""
        known = self.environment()
        return [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], w) for w in self.container["command"]]


def _asked_by_grpc(host: Host, asked: Mapping[str, Any], timeout_s: float) -> bool:
    with grpc.insecure_channel(f"{host.address}:{asked['port']}") as channel:
        check = channel.unary_unary(*HEALTH_CHECK)
        request = health_pb2.HealthCheckRequest(service=asked.get("service", ""))
        try:
            answer = check(request, timeout=timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def pods_of(objects: Sequence[Manifest], hosts: Sequence[Host]) -> list[Pod]:
    """The pods of all workloads, on one host each."""
    free = iter(hosts)
    found = []
    for each in objects:
        name = each["metadata"]["name"]
        if each["kind"] in ("StatefulSet", "Deployment"):
            template, replicas = each["spec"]["template"], range(each["spec"]["replicas"])
            found += [Pod(f"{name}-{index}", index, template, next(free)) for index in replicas]
        elif each["kind"] == "Pod":
            found.append(Pod(name, 0, each, next(free)))
    return found


class Node:
    """Starts pods, and ends them as Kubernetes does. Belongs to a process that reaches the pods' network."""

    def __init__(
        self, folder: Path, objects: Sequence[Manifest], pods: Sequence[Pod], volumes: Mapping[str, Path]
    ) -> None:
        """`volumes`: by name, what claims and Secrets hold."""
        self._folder = folder
        self._volumes = volumes
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "config").mkdir(exist_ok=True)
        for name, text in config_files(objects).items():
            (folder / "config" / name).write_text(text)
        lines = ["127.0.0.1 localhost"]
        for service in (each for each in objects if each["kind"] == "Service"):
            chosen = (pod for pod in pods if selects(service["spec"]["selector"], pod.manifest))
            name = service["metadata"]["name"]
            lines += [f"{pod.host.address} {name} {name}.{NAMESPACE}.svc" for pod in chosen]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, pod: Pod) -> subprocess.Popen[bytes]:
        """Start its container."""
        root = self._folder / pod.name / "root"
        root.mkdir(parents=True, exist_ok=True)
        user = str(pod.manifest["spec"]["securityContext"]["runAsUser"])
        words = ["bash", "-c", _ENTER, "bash", str(root), user, *self._mounts(pod), "--"]
        paths = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        variables = [f"{key}={value}" for key, value in pod.environment().items()]
        words += ["env", "-i", f"PATH={paths}", *variables, *pod.command()]
        with self.log_file(pod).open("ab") as log:
            process = pod.host.start(["unshare", "--mount", *words], stdout=log, stderr=log)
        self.processes[pod.name] = process
        return process

    def _mounts(self, pod: Pod) -> list[str]:
        own = {"config": self._folder / "config", "scratch": self._scratch(pod)}
        sources = {**self._volumes, **own}
        found = [f"{self._folder / 'hosts'}:/etc/hosts:ro"]
        for mount in pod.container["volumeMounts"]:
            mode = "ro" if mount.get("readOnly") else "rw"
            found.append(f"{sources[mount['name']]}:{mount['mountPath']}:{mode}")
        # Last, for a checkout may lie below a place that a volume covers, /tmp say.
        image = {Path(sys.base_prefix), ROOT, Path(sys.prefix)} - {Path("/usr")}
        return found + [f"{path}:{path}:ro" for path in sorted(image)]

    def _scratch(self, pod: Pod) -> Path:
        scratch = self._folder / pod.name / "scratch"
        scratch.mkdir(exist_ok=True)
        scratch.chmod(0o777)
        return scratch

    def await_probe(self, pod: Pod, kind: str) -> None:
        """Ask one of its probes until it succeeds; a process that ends instead fails."""
        end_s = time.monotonic() + _STARTED_S
        while not self.probe(pod, kind):
            assert self.processes[pod.name].poll() is None, f"{pod.name} ended:\n{self.log(pod)}"
            assert time.monotonic() < end_s, f"{pod.name}: {kind} never succeeded:\n{self.log(pod)}"
            threading.Event().wait(_LOOK_S)

    def probe(self, pod: Pod, kind: str) -> bool:
        """Ask a probe once, as the kubelet does."""
        probe: Mapping[str, Any] = pod.container[kind]
        if "grpc" in probe:
            return _asked_by_grpc(pod.host, probe["grpc"], probe["timeoutSeconds"])
        asked = probe["httpGet"]
        url = f"http://{pod.host.address}:{pod.port(asked['port'])}{asked['path']}"
        try:
            urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]).close()
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return False
        except OSError:  # not yet listening
            return False
        return True

    def delete(self, pod: Pod) -> int:
        """preStop, SIGTERM, SIGKILL after the grace; returns the exit status."""
        process = self.processes.pop(pod.name)
        end_s = time.monotonic() + pod.grace_s
        hook = pod.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            subprocess.run(hook["exec"]["command"], check=True, timeout=pod.grace_s)
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(end_s - time.monotonic())
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(10)

    def log_file(self, pod: Pod) -> Path:
        """Where its container writes."""
        return self._folder / f"{pod.name}.log"

    def log(self, pod: Pod) -> str:
        """The end of what it wrote."""
        return self.log_file(pod).read_text()[-3000:]

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait(10)
