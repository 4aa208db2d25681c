"""Run on a host of the pods' network: a rendered release, started, asked, disturbed and ended.

`python -m tests.helm.pods_program RENDERED MODEL FOLDER NAMESPACE=ADDRESS...`; the last line is JSON.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from anabranch import Client
from tests.helm.charts import manifests
from tests.helm.pods import Node, Pod, pods_of
from tests.models import random_prompt
from tests.system.hosts import Host

PROMPT = random_prompt(70, seed=5)
TOKENS = 400


def main(rendered: str, model: str, folder: str, *hosts: str) -> None:
    """Start all pods; run the chart's own test; read metrics; stream while the attention worker that holds
    the tail is deleted, and start that pod again; delete everything. Prints what came of it.
    """
    objects = manifests(Path(rendered).read_text())
    pods = pods_of(objects, [Host(*each.split("=")) for each in hosts])
    node = Node(Path(folder), objects, pods, Path(model))
    test, serving = _part(pods)
    try:
        for pod in serving:
            node.start(pod)
        for pod in serving:
            node.await_probe(pod, "startupProbe")
            node.await_probe(pod, "readinessProbe")
        asked = node.start(test)
        helm_test = asked.wait(60)
        answer = node.log(test)
        exposed = {pod.name: _metrics(pod) for pod in serving}
        outcome = _disturbed_stream(node, serving)
        last = {pod.name: node.delete(pod) for pod in _leaving_order(serving)}
    finally:
        node.kill()
    print(json.dumps({"test": [helm_test, answer], "metrics": exposed, "last": last, **outcome}))


def _part(pods: Sequence[Pod]) -> tuple[Pod, list[Pod]]:
    (test,) = (pod for pod in pods if _role(pod) == "test")
    return test, [pod for pod in pods if pod is not test]


def _role(pod: Pod) -> str:
    return str(pod.manifest["metadata"]["labels"]["app.kubernetes.io/component"])


def _leaving_order(pods: Sequence[Pod]) -> list[Pod]:
    order = ("gateway", "dense", "attention", "controller")
    return sorted(pods, key=lambda pod: order.index(_role(pod)))


def _disturbed_stream(node: Node, pods: Sequence[Pod]) -> dict[str, object]:
    gateway = next(pod for pod in pods if _role(pod) == "gateway")
    tokens: list[int] = []
    deleted: Future[int] | None = None
    victim: Pod | None = None
    with ThreadPoolExecutor(1) as hands, Client(f"{gateway.host.address}:8650") as client:
        stream = client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        for event in stream:
            tokens += getattr(event, "token_ids", ())
            if deleted is None and len(tokens) >= 4:
                holder = client.topology(stream.request_id).shards[-1].worker_id
                victim = next(pod for pod in pods if _role(pod) == "attention" and pod.name.endswith(holder))
                deleted = hands.submit(node.delete, victim)
        assert deleted is not None
        assert victim is not None
        is_early = deleted.done()
        status = deleted.result()
    log = node.log(victim)
    node.start(victim)
    node.await_probe(victim, "readinessProbe")
    return {"tokens": tokens, "deleted": status, "early": is_early, "log": log}


def _metrics(pod: Pod) -> list[str]:
    """Names of all series a pod exposes."""
    (port,) = (each["containerPort"] for each in pod.container["ports"] if each["name"] == "metrics")
    with urllib.request.urlopen(f"http://{pod.host.address}:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sorted({line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#")})


if __name__ == "__main__":
    main(*sys.argv[1:])
