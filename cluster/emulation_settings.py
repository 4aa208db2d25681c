"""The part of the configuration file that makes a cluster of small machines keep the time of another."""

from __future__ import annotations

from pydantic import Field

from cluster.config_section import Section


class EmulatedDevice(Section):
    """A kind of device, and how many of it act as one."""

    devices: int = Field(1, ge=1, description="Devices that act as one.")
    flops_per_s: float = Field(gt=0, description="FLOP per second of one of them.")
    bandwidth_bytes_per_s: float = Field(gt=0, description="Bytes per second from its memory.")
    network_bytes_per_s: float = Field(gt=0, description="Bytes per second to other machines.")


class EmulatedModel(Section):
    """What of a model decides how long its steps take (`cluster.perfmodel.ModelShape`)."""

    weight_bytes: float = Field(gt=0, description="Of all weights.")
    element_bytes: int = Field(2, ge=1, description="Of a weight, and of a number in the cache.")
    layers: int = Field(ge=1, description="Layers.")
    hidden_size: int = Field(ge=1, description="Width of the queries.")
    query_group: int = Field(ge=1, description="Query heads of a KV head.")


class EmulationConfig(Section):
    """Steps, attends and lanes take `dilation` times as long as a model of these devices says."""

    dilation: float = Field(ge=1, description="How many times slower than the emulated cluster this one is.")
    model: EmulatedModel
    dense: EmulatedDevice
    attention: EmulatedDevice | None = None
    network_share: float = Field(0.914, gt=0, le=1, description="Share of the line rate that is reached.")
    round_trip_s: float = Field(33e-6, ge=0, description="Of an exchange of a layer.")
    overlaps: bool = Field(
        True, description="Whether keys and values travel while old tokens are attended to, or before."
    )
