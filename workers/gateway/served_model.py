"""The one model a gateway speaks for: its name, limits, tokenizer, and whose time it keeps; no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config import Config
from cluster.errors import ConfigError, NotFound
from cluster.model_spec import ModelSpec
from workers.gateway.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """What requests are checked against and turned into tokens with."""

    name: str
    spec: ModelSpec
    tokenizer: Tokenizer
    max_sequence_length: int
    dilation: float | None
    """How many times slower the cluster is than the one it emulates, if it does."""

    @classmethod
    def load(cls, config: Config) -> ServedModel:
        """Read the folder `model.path`; takes a moment, so not on an event loop.

        Raises ModelError, or ConfigError where a longer sequence is configured than the model knows.
        """
        folder = Path(config.model.path)
        spec = ModelSpec.from_folder(folder)
        longest = config.model.max_sequence_length or spec.max_sequence_length
        if longest > spec.max_sequence_length:
            raise ConfigError(
                f"model.max_sequence_length is {longest}, but the model serves at most "
                f"{spec.max_sequence_length}: lower it"
            )
        dilation = config.emulation.dilation if config.emulation else None
        return cls(config.model.served_name, spec, Tokenizer(folder), longest, dilation)

    def require(self, name: str) -> None:
        """Refuse a request for another model; an empty name means the one served."""
        if name not in ("", self.name):
            raise NotFound(f"model {name!r} is not served here; {self.name!r} is")
