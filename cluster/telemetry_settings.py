"""The part of the configuration file that says what processes tell of themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config_section import Section
from cluster.config_values import Port


class CostConfig(Section):
    """What tokens cost, in the gateways' metrics."""

    dense: str | None = Field(
        None, description="Kind of device each dense worker is paid as, for example h100; null: no costs."
    )
    attention: str | None = Field(None, description="The same of each attention worker.")
    prices: str | None = Field(
        None,
        description="TOML file: a table for each kind with price_per_hour_usd, price_date and source; null: "
        "those of the hardware catalogue, some of which are examples only.",
    )

    @model_validator(mode="after")
    def _dense_is_paid_for(self) -> CostConfig:
        if self.dense is None and (self.attention is not None or self.prices is not None):
            raise ValueError("cost: name the kind of the dense workers (cost.dense): every cluster has some")
        return self


class TelemetryConfig(Section):
    """Logs and metrics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level written."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="One JSON object or one text line per event."
    )
    metrics_port: Port | None = Field(
        None,
        description="Prometheus: gateway i adds i, controller 99, dense i 100 + i, attention i 2000 + i. A "
        "taken port is replaced by a free one; `anabranch status --json` names it. 0 draws one; null is off.",
    )
    cost: CostConfig = Field(CostConfig(), description="What tokens cost, in the gateways' metrics.")
