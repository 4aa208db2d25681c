"""The catalogue of hardware classes: figures with their sources, and who is worth its price for what."""

from __future__ import annotations

import datetime
import functools
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import ConfigError
from cluster.perfmodel import DeviceSpeed
from cluster.placement_settings import PlacementConfig


class HardwareClass(BaseModel):
    """One kind of device (of node, for CPUs); prices per device and hour. Unknown figures are None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    device: Literal["cuda", "tpu", "cpu"]
    accelerator_types: tuple[str, ...]
    flops_per_s: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)
    bandwidth_bytes_per_s: float = Field(gt=0)
    network_bytes_per_s: float | None = Field(None, gt=0)
    power_watts: float | None = Field(None, gt=0)
    price_per_hour_usd: float = Field(gt=0)
    price_date: datetime.date
    """When the price was that."""
    sources: dict[str, str]

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> HardwareClass:
        figures = {
            name
            for name, field in HardwareClass.model_fields.items()
            if field.annotation in (float, float | None) and getattr(self, name) is not None
        }
        if figures != set(self.sources):
            raise ValueError(f"sources must name exactly {', '.join(sorted(figures))}")
        return self

    @property
    def speed(self) -> DeviceSpeed:
        """What the performance model computes with."""
        return DeviceSpeed(self.flops_per_s, self.bandwidth_bytes_per_s, self.memory_bytes)

    @property
    def flops_per_dollar(self) -> float:
        """What dense operators pay for."""
        return self.flops_per_s * 3600 / self.price_per_hour_usd

    @property
    def bandwidth_bytes_per_dollar(self) -> float:
        """What attention pays for: bytes read."""
        return self.bandwidth_bytes_per_s * 3600 / self.price_per_hour_usd

    @property
    def memory_bytes_per_dollar_hour(self) -> float:
        """What a KV cache pays for: bytes held."""
        return self.memory_bytes / self.price_per_hour_usd


Catalogue = Mapping[str, HardwareClass]


def parse(text: str, where: str) -> Catalogue:
    """The catalogue in a TOML text; ConfigError names `where`, the class and the key."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from error
    if not tables:
        raise ConfigError(f"{where}: at least one hardware class is expected")
    classes: dict[str, HardwareClass] = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {name} is a value; a table [{name}] is expected")
        try:
            classes[name] = HardwareClass.model_validate({**table, "name": name})
        except ValidationError as error:
            faults = (".".join([name, *map(str, e["loc"])]) + f": {e['msg']}" for e in error.errors())
            raise ConfigError(f"{where}: {'; '.join(faults)}") from error
    return classes


@functools.cache
def built_in() -> Catalogue:
    """The catalogue shipped with the project."""
    return parse((files("cluster") / "hardware.toml").read_text("utf-8"), "cluster/hardware.toml")


def load(path: str | None) -> Catalogue:
    """The catalogue in a file (placement.hardware), or the built-in one. Raises ConfigError."""
    if path is None:
        return built_in()
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"placement.hardware: {path}: cannot be read: {error}") from error
    return parse(text, path)


def require(names: Iterable[str], catalogue: Catalogue) -> None:
    """Raise ConfigError for a name that is neither a class nor a Ray accelerator type, in any case."""
    types = {name.upper() for item in catalogue.values() for name in item.accelerator_types}
    for name in names:
        if name.upper() not in types | {known.upper() for known in catalogue}:
            raise ConfigError(
                f"placement: no hardware class is called {name}; there are {', '.join(catalogue)}"
            )


def of(placement: PlacementConfig) -> Catalogue:
    """The catalogue that roles are placed by. Raises ConfigError, also for a class it does not know."""
    catalogue = load(placement.hardware)
    require((*placement.dense_classes, *placement.attention_classes), catalogue)
    return catalogue


def dense_rank(catalogue: Catalogue) -> tuple[str, ...]:
    """Classes by FLOPS per dollar, best first: dense operators are compute-bound over a batch."""
    return tuple(sorted(catalogue, key=lambda name: (-catalogue[name].flops_per_dollar, name)))


def attention_rank(catalogue: Catalogue) -> tuple[str, ...]:
    """Classes by bandwidth per dollar, then memory per dollar: attention reads the cache at any batch."""

    def worth(name: str) -> tuple[float, float, str]:
        item = catalogue[name]
        return -item.bandwidth_bytes_per_dollar, -item.memory_bytes_per_dollar_hour, name

    return tuple(sorted(catalogue, key=worth))


def class_of(accelerator_types: Iterable[str], catalogue: Catalogue) -> HardwareClass | None:
    """The class of a node from Ray's accelerator names; a node without any is of the first CPU class."""
    names = {name.upper() for name in accelerator_types}
    for item in catalogue.values():
        if names & {name.upper() for name in item.accelerator_types} or (not names and item.device == "cpu"):
            return item
    return None
