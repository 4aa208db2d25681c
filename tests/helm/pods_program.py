"""Run on a host of the pods' network: a rendered release, started, watched, asked, disturbed and ended.

`python -m tests.helm.pods_program RENDERED MODEL FOLDER NAMESPACE=ADDRESS...`; the last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from anabranch import Client
from anabranch.answers import Topology
from cluster.errors import InvalidRequest
from tests.helm.charts import manifests
from tests.helm.pods import Node, Pod, pods_of
from tests.helm.scraping import Prometheus, panel_queries
from tests.models import random_prompt
from tests.system.hosts import Host

PROMPT = random_prompt(70, seed=5)
TOKENS = 400

Victim = Callable[[Topology], str | None]
"""Chooses whom to delete, from where a request is served; None where that is not known yet."""


def main(rendered: str, model: str, folder: str, *hosts: str) -> None:
    """Start all pods and Prometheus; run the chart's own test; stream while the attention worker that holds
    the tail is deleted, and while the dense worker that computes is, and start these pods again; ask for what
    is refused; query every panel; delete everything. Prints what came of it.
    """
    objects = manifests(Path(rendered).read_text())
    pods = pods_of(objects, [Host(*each.split("=")) for each in hosts])
    node = Node(Path(folder), objects, pods, {"model": Path(model)})
    test, serving = _part(pods)
    prometheus = Prometheus(Path(folder), objects, serving)
    try:
        for pod in serving:
            node.start(pod)
        for pod in serving:
            node.await_probe(pod, "startupProbe")
            node.await_probe(pod, "readinessProbe")
        prometheus.await_targets()
        outcome = {role: _disturbed_stream(node, serving, victim) for role, victim in _VICTIMS.items()}
        asked = node.start(test)
        tested = asked.wait(60)
        _be_refused(serving)
        panels = {name: len(prometheus.await_query(query)) for name, query in panel_queries().items()}
        rules = prometheus.rules()
        last = {pod.name: node.delete(pod) for pod in _leaving_order(serving)}
    finally:
        node.kill()
        prometheus.kill()
    found = {"test": [tested, node.log(test)], "panels": panels, "rules": rules, "last": last}
    print(json.dumps(found | outcome))


def _part(pods: Sequence[Pod]) -> tuple[Pod, list[Pod]]:
    (test,) = (pod for pod in pods if pod.role == "test")
    return test, [pod for pod in pods if pod is not test]


def _leaving_order(pods: Sequence[Pod]) -> list[Pod]:
    order = ("gateway", "dense", "attention", "controller")
    return sorted(pods, key=lambda pod: order.index(pod.role))


def _holder_of_the_tail(found: Topology) -> str:
    return found.shards[-1].worker_id


def _who_computes(found: Topology) -> str | None:
    return next((member.worker_id for member in found.members if member.sequences_running), None)


_VICTIMS: dict[str, Victim] = {"attention": _holder_of_the_tail, "dense": _who_computes}


def _gateway(pods: Sequence[Pod]) -> Client:
    gateway = next(pod for pod in pods if pod.role == "gateway")
    return Client(f"{gateway.host.address}:8650")


def _disturbed_stream(node: Node, pods: Sequence[Pod], choose: Victim) -> dict[str, object]:
    tokens: list[int] = []
    deleted: Future[int] | None = None
    victim: Pod | None = None
    with ThreadPoolExecutor(1) as hands, _gateway(pods) as client:
        stream = client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        for event in stream:
            tokens += getattr(event, "token_ids", ())
            if (
                deleted is None
                and len(tokens) >= 4
                and (chosen := choose(client.topology(stream.request_id)))
            ):
                victim = next(pod for pod in pods if pod.name.endswith(chosen))
                deleted = hands.submit(node.delete, victim)
        assert deleted is not None
        assert victim is not None
        is_early = deleted.done()
        status = deleted.result()
    log = node.log(victim)
    node.start(victim)
    node.await_probe(victim, "readinessProbe")
    return {"tokens": tokens, "deleted": status, "early": is_early, "log": log}


def _be_refused(pods: Sequence[Pod]) -> None:
    with _gateway(pods) as client, contextlib.suppress(InvalidRequest):
        client.generate(token_ids=PROMPT, max_tokens=10**6).text()
        raise AssertionError("a request beyond the model's context was served")


if __name__ == "__main__":
    main(*sys.argv[1:])
