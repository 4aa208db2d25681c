"""What every part of the configuration file is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the file; frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
