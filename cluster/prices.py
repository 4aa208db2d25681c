"""What devices cost per hour, with the date and the source of each price: the catalogue's and, above them, a
file's.

[h100]
price_per_hour_usd = 2.49
price_date = 2026-11-01
source = "list price of a provider, on demand"
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster import hardware
from cluster.errors import InvalidRequest
from cluster.hardware import Catalogue, HardwareClass
from cluster.placement_settings import PlacementConfig
from cluster.telemetry_settings import CostConfig

_MILLION = 1e6
_HOUR_S = 3600.0


class Price(BaseModel):
    """Of one device of a kind (of one node, for CPUs)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    price_per_hour_usd: float = Field(gt=0)
    price_date: datetime.date
    source: str = Field(min_length=1)

    @property
    def usd_per_s(self) -> float:
        """Of one device."""
        return self.price_per_hour_usd / _HOUR_S

    def __str__(self) -> str:
        return f"${self.price_per_hour_usd:g} an hour on {self.price_date} ({self.source})"


Prices: TypeAlias = Mapping[str, Price]
"""By kind of device."""


def known(catalogue: Catalogue, file: Path | None) -> Prices:
    """A catalogue's and, in their place or beside them, a file's. Raises what `read` raises."""
    own = {name: of(item) for name, item in catalogue.items()}
    return {**own, **read(file)} if file else own


def repriced(catalogue: Catalogue, file: Path | None) -> Catalogue:
    """The same devices at a file's prices, where it has any. Raises what `read` raises, and InvalidRequest
    for a price of a kind that the catalogue does not have.
    """
    prices = known(catalogue, file)
    if strange := [name for name in prices if name not in catalogue]:
        raise InvalidRequest(
            f"{file}: prices of {', '.join(strange)}, which the catalogue of hardware does not have; it has "
            f"{', '.join(catalogue)}"
        )
    return {name: _at(item, prices[name]) for name, item in catalogue.items()}


def in_force(cost: CostConfig, placement: PlacementConfig) -> Prices:
    """Those by which a running cluster is charged: of the catalogue that roles are placed by, and above them
    of the file named. Raises InvalidRequest for a kind without a price, ConfigError for an unreadable
    catalogue.
    """
    prices = known(hardware.load(placement.hardware), Path(cost.prices) if cost.prices else None)
    for key, kind in (("dense", cost.dense), ("attention", cost.attention)):
        if kind is not None and kind not in prices:
            raise InvalidRequest(
                f"telemetry.cost.{key}: there is no price of {kind!r}, only of {', '.join(prices)}"
            )
    return prices


def per_mtok(usd: float | None, tokens: float) -> float | None:
    """Dollars per million tokens; None where either is not known."""
    return None if usd is None or not tokens else usd / tokens * _MILLION


def of(item: HardwareClass) -> Price:
    """A catalogue's, of one kind."""
    return Price(
        price_per_hour_usd=item.price_per_hour_usd,
        price_date=item.price_date,
        source=item.sources["price_per_hour_usd"],
    )


def read(path: Path) -> Prices:
    """A file's, and no others. Raises InvalidRequest with the key that is wrong."""
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} holds no prices: {error}") from error
    prices = {}
    for name, table in tables.items():
        try:
            prices[name] = Price.model_validate(table)
        except ValidationError as error:
            faults = (".".join([name, *map(str, e["loc"])]) + f": {e['msg']}" for e in error.errors())
            raise InvalidRequest(
                f"{path}: {'; '.join(faults)}; each kind has price_per_hour_usd, price_date and source, "
                "no figures of hardware"
            ) from error
    return prices


def _at(item: HardwareClass, price: Price) -> HardwareClass:
    return item.model_copy(
        update={
            "price_per_hour_usd": price.price_per_hour_usd,
            "price_date": price.price_date,
            "sources": {**item.sources, "price_per_hour_usd": price.source},
        }
    )
