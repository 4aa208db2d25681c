"""The hardware catalogue: which kinds of nodes there are, what they can do, what they cost.

Lamina's point in two ratios: dense work wants FLOPS per dollar, attention wants memory bandwidth per
dollar, and no device is best at both.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError

CPU_CLASS = "cpu-node"
"""The class of a node without a known accelerator."""

_BUILT_IN = Path(__file__).with_name("hardware.toml")


class HardwareClass(BaseModel):
    """One kind of device or node; units as in hardware.toml, derived values in SI units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16_tflops: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    network_gbit_s: float = Field(gt=0)
    power_w: float = Field(ge=0)
    price_usd_h: float = Field(gt=0)
    accelerators: tuple[str, ...]
    source: str
    date: datetime.date
    price_source: str
    price_date: datetime.date

    @property
    def flops_per_dollar(self) -> float:
        """BF16 FLOP/s per dollar and hour."""
        return self.bf16_tflops * 1e12 / self.price_usd_h

    @property
    def bandwidth_per_dollar(self) -> float:
        """Bytes per second of memory bandwidth per dollar and hour."""
        return self.bandwidth_gb_s * 1e9 / self.price_usd_h


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Hardware classes by name."""

    classes: Mapping[str, HardwareClass]

    def class_of(self, accelerator: str | None) -> str:
        """The class of a node by its accelerator type; unknown or none is `CPU_CLASS`."""
        for name, hardware in self.classes.items():
            if accelerator is not None and accelerator in hardware.accelerators:
                return name
        return CPU_CLASS

    def dense_rank(self) -> tuple[str, ...]:
        """Classes in the order in which dense workers want them: FLOPS per dollar."""
        return self._ranked(lambda hardware: hardware.flops_per_dollar)

    def attention_rank(self) -> tuple[str, ...]:
        """Classes in the order in which attention workers want them: bandwidth per dollar."""
        return self._ranked(lambda hardware: hardware.bandwidth_per_dollar)

    def require(self, names: tuple[str, ...]) -> None:
        """Raise ConfigError for a class that is not in the catalogue."""
        for name in names:
            if name not in self.classes:
                known = ", ".join(self.classes)
                raise ConfigError(f"placement: no hardware class is called {name}; there are {known}")

    def _ranked(self, worth: Callable[[HardwareClass], float]) -> tuple[str, ...]:
        return tuple(sorted(self.classes, key=lambda name: -worth(self.classes[name])))


def load_catalogue(path: Path | None = None) -> Catalogue:
    """Read a catalogue, or the built-in one. Raises ConfigError naming file, class and key."""
    file = path or _BUILT_IN
    try:
        raw = tomllib.loads(file.read_text())
        return Catalogue({name: HardwareClass.model_validate(fields) for name, fields in raw.items()})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"placement.hardware: {file} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"placement.hardware: {file}: {key}: {first['msg']}") from error
