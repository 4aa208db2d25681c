"""The part of the configuration file that says what processes tell of themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config_section import Section
from cluster.config_values import Port


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
