"""Run on a host of the pods' network: a rendered release with mutual TLS, started and asked.

`python -m tests.helm.tls_program RENDERED MODEL SECRET CLIENT FOLDER NAMESPACE=ADDRESS...`: SECRET is the
folder that pods mount, CLIENT a TlsConfig as JSON. The last line is JSON.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from anabranch import Client
from cluster.config import TlsConfig
from cluster.health import OwnHealth
from tests.helm.charts import manifests
from tests.helm.pods import Node, Pod, pods_of
from tests.models import random_prompt
from tests.system.hosts import Host

PROMPT = random_prompt(20, seed=6)
TOKENS = 12

_DEADLINE_S = 10.0


def main(rendered: str, model: str, secret: str, client: str, folder: str, *hosts: str) -> None:
    """Start all pods; run the chart's own test; ask by gRPC and by HTTP; knock at every gRPC port with a
    certificate, without one, and in plain text. Prints what came of it.
    """
    objects = manifests(Path(rendered).read_text())
    pods = pods_of(objects, [Host(*each.split("=")) for each in hosts])
    node = Node(Path(folder), objects, pods, {"model": Path(model), "tls": Path(secret)})
    (test,) = (pod for pod in pods if pod.role == "test")
    serving = [pod for pod in pods if pod is not test]
    (gateway,) = (pod for pod in pods if pod.role == "gateway")
    trusted = TlsConfig.model_validate_json(client)
    try:
        for pod in serving:
            node.start(pod)
        for pod in serving:
            node.await_probe(pod, "readinessProbe")
        tested = node.start(test).wait(60)
        found = {
            "test": [tested, node.log(test)],
            "tokens": _tokens(gateway, trusted),
            "https": [_https_status(gateway, each) for each in (trusted, _anonymous(trusted))],
            "problems": _problems(serving, trusted),
        }
    finally:
        node.kill()
    print(json.dumps(found))


def _anonymous(client: TlsConfig) -> TlsConfig:
    """Trusts whom the client trusts, and has nothing to show."""
    return TlsConfig(authority=client.authority, member_name=client.member_name)


def _tokens(gateway: Pod, tls: TlsConfig) -> Sequence[int]:
    with Client(f"{gateway.host.address}:8650", tls=tls) as client:
        stream = client.generate(token_ids=PROMPT, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        return [token for event in stream for token in getattr(event, "token_ids", ())]


def _https_status(gateway: Pod, tls: TlsConfig) -> int | None:
    """Of /v1/models; None where the connection is refused."""
    context = ssl.create_default_context(cafile=tls.authority)
    context.check_hostname = False  # an address is dialled
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    link = http.client.HTTPSConnection(gateway.host.address, 8651, context=context, timeout=_DEADLINE_S)
    try:
        link.request("GET", "/v1/models")
        return link.getresponse().status
    except OSError:  # an alert, or the connection's end after it
        return None
    finally:
        link.close()


def _problems(pods: Sequence[Pod], trusted: TlsConfig) -> dict[str, list[str]]:
    """What each pod's gRPC server says to who has a certificate, to who has none, and to plain text."""
    callers = (trusted, _anonymous(trusted), TlsConfig())
    return {
        pod.role: [OwnHealth(f"{pod.host.address}:{pod.port('grpc')}", each).problem("") for each in callers]
        for pod in pods
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
