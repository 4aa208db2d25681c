"""The one configuration file: every key, every default, every limit.

`load` refuses an unknown key by name with the nearest valid one, and limits that contradict each
other. Frozen after loading; derived values are properties. Roles receive the whole file, so that the
digest exchanged at registration covers it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cluster.config_errors import explain
from cluster.config_section import Section
from cluster.config_values import Bytes, Cores, Device, Port, Serves
from cluster.emulation_settings import EmulationConfig
from cluster.errors import ConfigError
from cluster.placement_settings import PlacementConfig
from cluster.registry.settings import RegistryConfig
from cluster.telemetry_settings import TelemetryConfig

_CORES = "Cores the role's processes are kept on; auto: own ones where roles share a machine; []: any."


class ModelConfig(Section):
    """What is served."""

    path: str = Field(
        "smollm2-135m-instruct", description="Folder, or a name known to `anabranch model list`."
    )
    name: str | None = Field(None, description="Name requests use; default: the folder's name.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Weights, activations and KV cache. Token identity is promised in float32."
    )
    max_sequence_length: int | None = Field(
        None, ge=1, description="Longest prompt + output; default: the model's."
    )

    @property
    def served_name(self) -> str:
        """Name requests use, and the `model_name` of metrics."""
        return self.name or Path(self.path).name


class GatewayConfig(Section):
    """The public side."""

    replicas: int = Field(1, ge=1, le=64, description="Gateway processes.")
    host: str = Field("127.0.0.1", description="Address the gRPC and HTTP servers bind.")
    port: Port = Field(8650, description="gRPC; 0 draws a free one; replica i adds i.")
    http_port: Port | None = Field(
        8651, description="OpenAI-compatible HTTP; null turns it off; replica i adds i."
    )
    max_streams: int = Field(256, ge=1, description="Open requests a gateway takes before it refuses more.")
    max_request_bytes: Bytes = Field(16 * 2**20, description="Largest message accepted.")
    connection_age_ms: int | None = Field(
        300_000, ge=1000, description="gRPC clients then connect anew; open streams go on. null: never."
    )
    default_max_tokens: int = Field(512, ge=1, description="max_tokens of a request that names none.")
    max_choices: int = Field(16, ge=1, le=128, description="Largest n.")
    default_deadline_ms: int = Field(600_000, ge=1, description="Deadline of a request that brings none.")
    stream_buffer_events: int = Field(
        4096, ge=16, description="Events held for a slow client before it is cut."
    )
    no_worker_wait_ms: int = Field(
        5000, ge=0, description="How long a new request waits when no dense worker is there."
    )


class DenseConfig(Section):
    """Weights and everything but attention."""

    replicas: int = Field(1, ge=1, le=1024, description="Dense workers.")
    device: Device = Field("cpu", description="cpu or cuda.")
    host: str = Field("127.0.0.1", description="Address the server for gateways binds.")
    port: Port = Field(0, description="gRPC; 0 draws a free one; replica i adds i.")
    threads: int = Field(1, ge=1, le=256, description="Compute threads; one where roles share cores.")
    cores: Cores = Field("auto", description=_CORES)
    micro_batches: Literal["auto", 1, 2] = Field(
        "auto", description="Two are staggered: one computes while the other waits for attention."
    )
    step_tokens: int = Field(256, ge=1, le=65536, description="Token budget of one step over all sequences.")
    max_batch: int = Field(64, ge=1, le=4096, description="Sequences in one step.")
    max_waiting: int = Field(256, ge=1, description="Sequences queued before RESOURCE_EXHAUSTED.")
    serves: tuple[Serves, ...] = Field(
        ("both",),
        min_length=1,
        description="prefill, decode or both, by replica; the last one holds for all that follow.",
    )
    reserve_ahead_tokens: int = Field(64, ge=1, description="Room asked for beyond what is needed now.")
    local_arena: Bytes = Field(
        0, description="KV cache in the dense process itself; 0 with attention workers."
    )
    orphan_grace_ms: int = Field(
        10_000, ge=0, description="How long sequences outlive their gateway's stream."
    )
    max_finished: int = Field(4096, ge=1, description="Finished sequences kept until acknowledged.")

    def serves_at(self, index: int) -> Serves:
        """What the replica of this index serves."""
        return self.serves[min(index, len(self.serves) - 1)]

    @model_validator(mode="after")
    def _somebody_serves_all(self) -> DenseConfig:
        served = {self.serves_at(index) for index in range(self.replicas)}
        if "both" not in served and len(served) == 1:
            missing = "decode" if "prefill" in served else "prefill"
            raise ValueError(f"serves: none of {self.replicas} replicas serves {missing}")
        if "prefill" in served and self.local_arena:
            raise ValueError("serves: prefill leaves its cache to others, so local_arena must be 0")
        return self


class TierConfig(Section):
    """One arena of an attention worker."""

    device: Device = Field("cpu", description="cpu (host memory) or cuda.")
    arena: Bytes = Field(description="KV cache that it holds.")


class AttentionConfig(Section):
    """The KV cache and attention over it."""

    replicas: int = Field(
        2,
        ge=0,
        le=4096,
        description="Attention workers; 0 is monolithic mode: the cache lies in the dense worker.",
    )
    device: Device = Field("cpu", description="cpu or cuda.")
    host: str = Field("127.0.0.1", description="Address the servers for dense workers and lanes bind.")
    port: Port = Field(0, description="gRPC; 0 draws a free one; each arena of each replica adds one.")
    threads: int = Field(1, ge=1, le=256, description="Compute threads; one where roles share cores.")
    cores: Cores = Field("auto", description=_CORES)
    arena: Bytes = Field(2**30, description="KV cache per worker; pages are touched only when used.")
    tiers: tuple[TierConfig, ...] = Field(
        (),
        description="More arenas of each worker, used where that is full, best first: such as "
        "[{device: cpu, arena: 64GiB}] behind one on a GPU.",
    )
    give_back_s: float = Field(
        10.0, ge=0, description="Memory of blocks free for so long goes back to the system; 0 keeps it."
    )
    block_tokens: int = Field(32, ge=1, le=1024, description="Tokens per block.")
    kernel: Literal["auto", "cpu", "reference", "torch", "triton"] = Field(
        "auto", description="Attention backend; auto is the fastest that is installed for the device."
    )
    prefix_sharing: bool = Field(
        True, description="Sequences of one tenant with a common prefix share its sealed blocks."
    )
    lease_ms: int = Field(30_000, ge=100, description="A sequence nobody renews is freed after this time.")
    max_lanes: int = Field(64, ge=1, description="Lanes open at once; one per dense worker is usual.")
    slice_rows: int = Field(128, ge=1, description="Query rows served before another lane gets its turn.")

    @property
    def every_tier(self) -> tuple[TierConfig, ...]:
        """All arenas of a worker, the best first."""
        return (TierConfig(device=self.device, arena=self.arena), *self.tiers)


class LaneConfig(Section):
    """The exchange per layer."""

    transports: tuple[Literal["local", "tcp", "grpc"], ...] = Field(
        ("local", "grpc"),
        min_length=1,
        description="Offered best first; tcp without TLS needs fenced_network.",
    )
    fenced_network: bool = Field(
        False, description="The network between workers is private: TCP lanes may be plain."
    )
    spin_us: int | None = Field(
        None,
        ge=0,
        le=10_000,
        description="How long a lane asks for bytes before it sleeps; null: not, but on cores of its own.",
    )
    deadline_floor_ms: int = Field(2000, ge=10, description="Least time a layer's reply may take.")
    deadline_factor: float = Field(
        10.0, ge=1, description="Deadline: the floor plus this times the predicted time."
    )


class ControllerConfig(Section):
    """Membership and supervision."""

    host: str = Field("127.0.0.1", description="Address the control server binds.")
    port: Port = Field(8600, description="0 draws a free one.")
    heartbeat_ms: int = Field(500, ge=10, description="How often each member says that it lives.")
    expiry_ms: int = Field(
        2500, ge=50, description="Silence after which a member, or a controller, is taken for dead."
    )
    start_timeout_s: float = Field(120.0, gt=0, description="Time a role may take to become ready.")
    drain_grace_s: float = Field(10.0, ge=0, description="Time open streams get at shutdown.")
    restart_backoff_s: float = Field(
        0.5, ge=0, description="First pause before a dead process is started again."
    )
    max_restarts: int = Field(10, ge=0, description="Starts in a row that fail before a slot is given up.")


class RayConfig(Section):
    """The Ray cluster that starts and places processes."""

    address: str | None = Field(
        None, description="Join this cluster; null starts a local one and stops it again."
    )
    local_cpus: int | None = Field(None, ge=1, description="CPUs the local cluster claims to have.")


class TlsConfig(Section):
    """TLS of every gRPC server and channel."""

    certificate: str | None = Field(None, description="PEM chain of this process.")
    key: str | None = Field(None, description="PEM private key.")
    authority: str | None = Field(None, description="PEM certificates that sign peers.")
    mutual: bool = Field(False, description="Servers demand a certificate of their clients.")
    member_name: str | None = Field(
        None,
        description="A name in every member's certificate, which one that is reached by IP address must "
        "show; null: the address itself must be in it.",
    )

    @property
    def enabled(self) -> bool:
        """Whether connections are encrypted."""
        return self.certificate is not None

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        if self.mutual and (self.authority is None or self.certificate is None):
            raise ValueError("mutual needs certificate, key and authority")
        return self


class SecurityConfig(Section):
    """Who may connect."""

    tls: TlsConfig = Field(TlsConfig(), description="Certificates; without them connections are plain text.")
    insecure: bool = Field(False, description="Allow plain text beyond loopback.")
    api_keys_file: str | None = Field(
        None, description="YAML: key -> {tenant, salt, max_streams, max_tokens}."
    )


class Config(Section):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    gateway: GatewayConfig = GatewayConfig()
    dense: DenseConfig = DenseConfig()
    attention: AttentionConfig = AttentionConfig()
    placement: PlacementConfig = PlacementConfig()
    lanes: LaneConfig = LaneConfig()
    controller: ControllerConfig = ControllerConfig()
    registry: RegistryConfig = RegistryConfig()
    ray: RayConfig = RayConfig()
    security: SecurityConfig = SecurityConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    emulation: EmulationConfig | None = Field(
        None, description="Keep the time of other devices: what `anabranch up --emulate` sets."
    )
    state_dir: str | None = Field(
        None, description="Logs, sockets and addresses; default: a folder per user."
    )

    @field_validator("registry", mode="before")
    @classmethod
    def _address_alone(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _registry_is_safe(self) -> Config:
        if self.registry.url is None or self.security.insecure:
            return self
        address = self.registry.parts
        if not (address.is_encrypted or is_loopback(address.host)):
            raise ValueError(
                f"registry.url: plain text to {address.host}; use rediss://, or security.insecure: true "
                "where the network is private"
            )
        return self

    @model_validator(mode="after")
    def _registry_is_missed_in_time(self) -> Config:
        # A controller that is cut off must know it before it takes anybody's silence for death.
        noticed_ms = self.controller.heartbeat_ms + 2 * self.registry.deadline_ms
        if self.registry.url is None or noticed_ms < self.controller.expiry_ms:
            return self
        raise ValueError("controller.expiry_ms is not above controller.heartbeat_ms + 2 registry.deadline_ms")

    @model_validator(mode="after")
    def _limits_agree(self) -> Config:
        if self.attention.replicas == 0 and self.dense.local_arena == 0:
            raise ValueError("attention.replicas: 0 (monolithic) needs dense.local_arena, for example 1GiB")
        if self.dense.max_batch > self.dense.step_tokens:
            raise ValueError(
                "dense.max_batch must not exceed dense.step_tokens: each running sequence takes a token"
            )
        if self.controller.expiry_ms < 2 * self.controller.heartbeat_ms:
            raise ValueError("controller.expiry_ms must be at least twice controller.heartbeat_ms")
        if self.placement.elastic and (self.ray.address is None or self.placement.instances != "shared"):
            raise ValueError(
                "placement.elastic: nodes come and go in a Ray cluster that is joined (ray.address), and"
                " attention workers are everybody's (placement.instances: shared)"
            )
        if "tcp" in self.lanes.transports and not (self.lanes.fenced_network or self.roles_share_machine):
            raise ValueError(
                "lanes.transports: tcp is plain text; set lanes.fenced_network: true if it may be"
            )
        return self

    @property
    def roles_share_machine(self) -> bool:
        """Whether dense and attention workers can only be reached from their own machine."""
        return all(is_loopback(host) for host in (self.attention.host, self.dense.host))

    def port(self, first: int, further: int) -> int:
        """The port of a process that is `further` behind the first of its kind, or 0 to draw one."""
        return first + further if first and not self.placement.own_addresses else first

    @property
    def digest(self) -> str:
        """SHA-256 of what all processes of one cluster must agree on, whatever their paths and ports."""
        shared = self.model_dump_json(
            include={
                "model": {"name", "dtype", "max_sequence_length"},
                "attention": {"block_tokens", "lease_ms"},
            }
        )
        return hashlib.sha256(shared.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The file that loads to this configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def is_loopback(host: str) -> bool:
    """Whether an address cannot be reached from other machines."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def load(path: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """Read a YAML file (or take the defaults) and apply `{"dense.threads": 2}`-style overrides.

    Raises ConfigError naming the file, the key, the nearest valid key, or the range.
    """
    raw: Any = {}
    if path is not None:
        try:
            raw = yaml.safe_load(path.read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: a mapping of sections is expected, not {type(raw).__name__}")
    for dotted, value in (overrides or {}).items():
        _assign(raw, dotted.split("."), value)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        where = f"{path}: " if path else ""
        raise ConfigError(where + explain(error, Config)) from error


def _assign(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    raw[keys[-1]] = value
