"""Every value of the chart: its type, its default, what it is.

The one place for them: `values.yaml`, `values.schema.json` and the table in the chart's README are made from
here (`deploy.helm.generate`). Names are camelCase there. Sizes of ours are written as in the configuration
file (4GiB), Kubernetes' quantities as Kubernetes writes them (4Gi); the schema refuses one for the other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from cluster.policies.autoscaler import AutoscalerPolicy

Size = Annotated[str, Field(pattern=r"^[1-9][0-9]*(KiB|MiB|GiB|TiB|kB|MB|GB|TB)$")]
"""Whole numbers only: templates compute with them."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Count = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Share = Annotated[float, Field(gt=0, lt=1)]
Peers = list[dict[str, Any]]
Anything = dict[str, Any]
Words = dict[str, str]

_POLICY = AutoscalerPolicy()


class Part(BaseModel):
    """A part of the values; closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class Image(Part):
    """The image of all processes that name no other."""

    repository: str = Field("anabranch", min_length=1, description="Where it is pulled from, without tag.")
    tag: str | None = Field(None, description="Tag; null is the chart's appVersion.")
    digest: str | None = Field(
        None, pattern=r"^sha256:[0-9a-f]{64}$", description="sha256:..., which goes before the tag."
    )
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="When to pull."
    )
    pull_secrets: list[Name] = Field([], description="Names of Secrets to pull with.")


class EnvironmentVariable(Part):
    """One variable, by value or by reference."""

    name: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Its name.")
    value: str | None = Field(None, description="Its value.")
    value_from: Anything | None = Field(None, description="Where its value is, as in a container.")


class Model(Part):
    """What is served, and how it comes to the pods that read it (all but attention workers)."""

    name: str = Field("smollm2-135m-instruct", min_length=1, description="Name requests use.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Weights, activations and KV cache. Token identity is promised in float32."
    )
    delivery: Literal["fetch", "claim", "image"] = Field(
        "fetch",
        description="fetch: an init container runs `anabranch model fetch`; claim: a PersistentVolumeClaim "
        "that exists; image: it is in the image.",
    )
    source: str | None = Field(
        None,
        min_length=1,
        description="What is fetched: a hub's OWNER/NAME@COMMIT, or the https:// URL of a folder with "
        "SHA256SUMS; null: model.name, one of `anabranch model list`.",
    )
    extra_env: list[EnvironmentVariable] = Field(
        [],
        description="Environment of the fetch: HF_TOKEN, HF_ENDPOINT, ANABRANCH_MODEL_AUTHORIZATION.",
    )
    claim: Name | None = Field(None, description="The claim, mounted read-only (delivery: claim).")
    path: str | None = Field(
        None, description="The model's folder: in the claim, or absolute in the image. Not for fetch."
    )
    fetch_space: Quantity = Field("2Gi", description="Most that a fetched model takes on a node's disk.")


class Resources(Part):
    """What a container asks for, and what it may take; `nvidia.com/gpu: 1` is added for device: cuda."""

    requests: dict[str, Quantity] = Field({}, description="Asked for.")
    limits: dict[str, Quantity] = Field({}, description="Allowed at most.")


class Role(Part):
    """What all roles have."""

    replicas: Count = Field(1, description="Pods.")
    image: str | None = Field(None, description="Another image than image.repository and tag.")
    resources: Resources = Field(Resources(), description="Requests and limits.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda.")
    node_selector: Words = Field({}, description="Labels of nodes.")
    tolerations: list[Anything] = Field([], description="Tolerations.")
    affinity: Anything = Field({}, description="Affinity.")
    topology_spread: list[Anything] = Field(
        [], description="topologySpreadConstraints; a labelSelector is added where there is none."
    )
    extra_env: list[EnvironmentVariable] = Field([], description="More environment variables.")


class Controller(Role):
    """The head: who lives, where prefixes lie, what moves. One, which may restart while all else serves."""

    replicas: Literal[1] = Field(1, description="One: there is one controller.")
    device: Literal["cpu"] = Field("cpu", description="It computes nothing.")
    resources: Resources = Field(
        Resources(requests={"cpu": "250m", "memory": "256Mi"}, limits={"memory": "1Gi"}),
        description="Requests and limits.",
    )


class GatewayService(Part):
    """The Service that clients use; `RELEASE-gateway-headless` beside it names every gateway."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field("ClusterIP", description="Its type.")
    grpc_port: Annotated[int, Field(ge=1, le=65535)] = Field(8650, description="gRPC.")
    http_port: Annotated[int, Field(ge=1, le=65535)] = Field(8651, description="OpenAI-compatible HTTP.")
    annotations: Words = Field({}, description="Annotations, for a load balancer.")


class Gateway(Role):
    """The public side."""

    replicas: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Pods.")
    device: Literal["cpu"] = Field("cpu", description="It computes nothing.")
    resources: Resources = Field(
        Resources(requests={"cpu": "500m", "memory": "512Mi"}, limits={"memory": "2Gi"}),
        description="Requests and limits.",
    )
    service: GatewayService = Field(GatewayService(), description="The Service that clients use.")


class Dense(Role):
    """Weights and everything but attention."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = Field(1, description="Pods.")
    resources: Resources = Field(
        Resources(requests={"cpu": "1", "memory": "2Gi"}, limits={"memory": "4Gi"}),
        description="Requests and limits; memory for the weights in model.dtype, and 1 GiB beside them.",
    )


class Attention(Role):
    """The KV cache, and attention over it."""

    replicas: Annotated[int, Field(ge=0, le=4096)] = Field(
        2, description="Pods; 0 keeps the cache in the dense worker (config.dense.local_arena)."
    )
    arena: Size = Field("1GiB", description="KV cache per pod, on its device.")
    memory_margin: Size = Field(
        "512MiB", description="Memory beside the arena: interpreter, PyTorch, buffers of lanes."
    )
    resources: Resources = Field(
        Resources(requests={"cpu": "1"}),
        description="Requests and limits. Memory is computed: arena (on a CPU) and margin; a figure given "
        "here that is below it fails the render.",
    )


class PasswordSecret(Part):
    """A Secret that exists."""

    name: Name | None = Field(None, description="The Secret; null: no password.")
    key: str = Field("password", description="Its key.")


class KubeRay(Part):
    """Pods that are Ray nodes (mode: kuberay)."""

    memory_margin: Size = Field("1GiB", description="Memory of each for Ray's own processes.")
    head_resources: Resources = Field(
        Resources(requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "2Gi"}),
        description="Requests and limits of Ray on the head, beside the controller.",
    )


class Registry(Part):
    """Where a copy of membership and prefix directory outlives the controller: in a Redis, or nowhere."""

    url: str | None = Field(
        None,
        pattern=r"^rediss?://([^:@/]+@)?[^@/]+(/[0-9]+)?$",
        description="redis://HOST:PORT/DB or rediss://..., no password in it; null: none, or builtIn.",
    )
    built_in: bool = Field(False, description="Run a small Redis in this release, without a disk.")
    image: str = Field("redis:7", min_length=1, description="Image of the built-in one.")
    resources: Resources = Field(
        Resources(requests={"cpu": "100m", "memory": "128Mi"}, limits={"memory": "512Mi"}),
        description="Requests and limits of the built-in one.",
    )
    password_secret: PasswordSecret = Field(PasswordSecret(), description="Its password, by reference.")


class Tls(Part):
    """TLS between pods, and of gateways to clients, with one certificate for all pods."""

    existing_secret: Name | None = Field(
        None,
        description="A Secret that exists, with tls.crt, tls.key and ca.crt, as cert-manager makes it; null: "
        "plain text. The README says which names the certificate must carry.",
    )
    mutual: bool = Field(
        False, description="Ask for a certificate that ca.crt has signed, of pods and of clients of gateways."
    )


class ApiKeys(Part):
    """Keys that clients must show, and their tenants and limits: `security.api_keys_file`."""

    existing_secret: Name | None = Field(None, description="A Secret that exists; null: no key is asked for.")
    key: str = Field("keys.yaml", description="Its key that holds the file.")
    test_secret: Name | None = Field(
        None, description="A Secret whose key `api-key` holds one of them, for `helm test`."
    )


class Drain(Part):
    """How long a pod that is told to end gets, so that no stream is cut and no cache lost."""

    bandwidth: Size = Field("100MB", description="Bytes a second at which a worker's cache moves to others.")
    seconds: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The grace; null: attention.arena over drain.bandwidth, plus 30."
    )


class ScaleBounds(Part):
    """Fewest and most pods of a role."""

    least: Annotated[int, Field(ge=1)] = Field(1, description="Fewest.")
    most: Annotated[int, Field(ge=1)] = Field(4, description="Most.")


class Autoscaler(Part):
    """Changes numbers of attention and dense workers by the load; one that leaves drains first."""

    enabled: bool = Field(False, description="Run it.")
    dry_run: bool = Field(True, description="Only log what it would do (`would_resize`).")
    pool_share: Share = Field(_POLICY.pool_share, description="Share of the KV pool in use to aim at.")
    busy_share: Share = Field(_POLICY.busy_share, description="Share of dense workers' time to aim at.")
    cool_down_seconds: Count = Field(
        int(_POLICY.cool_down_s), description="Time for which a role is left alone after a change."
    )
    attention: ScaleBounds = Field(ScaleBounds(), description="Attention workers.")
    dense: ScaleBounds = Field(ScaleBounds(), description="Dense workers.")
    resources: Resources = Field(
        Resources(requests={"cpu": "50m", "memory": "128Mi"}, limits={"memory": "256Mi"}),
        description="Requests and limits.",
    )


class Probes(Part):
    """Health, as the kubelet asks for it."""

    startup_seconds: Annotated[int, Field(ge=10)] = Field(
        600, description="Time a pod may take to load the model and to meet the controller."
    )


class DisruptionBudget(Part):
    """PodDisruptionBudgets of gateways, dense and attention workers."""

    enabled: bool = Field(True, description="Make them.")
    max_unavailable: Annotated[int, Field(ge=1)] = Field(1, description="Pods of a role that may be away.")


class NetworkPolicy(Part):
    """Who may connect to what. Without mutual TLS nothing else keeps strangers from joining: leave it on."""

    enabled: bool = Field(True, description="Fence internal ports; the network must enforce policies.")
    clients_from: Peers = Field([], description="Peers that may reach gateways, as in `from`; []: everybody.")
    metrics_from: Peers = Field(
        [{"namespaceSelector": {}}],
        description="Peers that may read metrics; by default the pods of any namespace.",
    )


class Monitoring(Part):
    """Prometheus and Grafana; objects of an operator that is not installed are left out."""

    pod_monitor: bool = Field(True, description="A PodMonitor, where monitoring.coreos.com/v1 is there.")
    rules: bool = Field(True, description="A PrometheusRule, where monitoring.coreos.com/v1 is there.")
    dashboard: bool = Field(False, description="A ConfigMap for Grafana's sidecar.")
    prices: str = Field(
        "",
        description="Prices as TOML, a table for each kind of device; `config.telemetry.cost` says what is "
        "paid for. Read when a gateway starts.",
    )
    labels: Words = Field({}, description="Labels of PodMonitor and PrometheusRule, by which yours selects.")
    dashboard_labels: Words = Field({"grafana_dashboard": "1"}, description="Labels of the dashboard.")


class Values(Part):
    """The chart's values."""

    name_override: str = Field("", description="Instead of the chart's name, in names.")
    fullname_override: str = Field("", description="Instead of release and chart name, in names.")
    mode: Literal["statefulset", "kuberay"] = Field(
        "statefulset",
        description="statefulset: each pod runs a role, without Ray; kuberay: a RayCluster, on whose nodes "
        "the controller places roles, checked against the operator's definition but never run.",
    )
    image: Image = Image()
    model: Model = Model()
    config: Anything = Field(
        {},
        description="Other keys of the configuration file, spelled as there: see `anabranch config`.",
    )
    controller: Controller = Controller()
    gateway: Gateway = Gateway()
    dense: Dense = Dense()
    attention: Attention = Attention()
    kuberay: KubeRay = KubeRay()
    registry: Registry = Registry()
    tls: Tls = Tls()
    api_keys: ApiKeys = ApiKeys()
    drain: Drain = Drain()
    autoscaler: Autoscaler = Autoscaler()
    probes: Probes = Probes()
    pod_disruption_budget: DisruptionBudget = DisruptionBudget()
    network_policy: NetworkPolicy = NetworkPolicy()
    monitoring: Monitoring = Monitoring()
