"""What the processes of `anabranch bench step` and of the long benches are told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

from cluster.config import Config
from cluster.types import Epoch, WorkerId

ATTENTION_EPOCH = Epoch(2)
DENSE_WORKER = WorkerId("dense-0")
LOCAL_WORKER = WorkerId("dense-0-local")
DENSE_EPOCH = Epoch(1)

_LEASE_MS = 3_600_000
"""Nobody renews what is filled until a dense worker takes it over, and filling gigabytes takes minutes."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """One mode: where the dense side computes, and where attention does; no cores: in the dense process."""

    model: str
    dense_cores: tuple[int, ...]
    attention_cores: tuple[int, ...] = ()
    attention_port: int = 0
    micro_batches: Literal["auto", 1, 2] = "auto"
    arena_bytes: int = 2**31
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attention_workers: int = 1
    attention_index: int = 0
    step_tokens: int = 256
    prefix_sharing: bool = True
    shard_tokens: int = 2**20
    spins: bool = True

    @property
    def attention_worker(self) -> WorkerId:
        """The name of the attention worker that is told this."""
        return WorkerId(f"attention-{self.attention_index}")

    def of_worker(self, index: int, cores: tuple[int, ...]) -> StepSettings:
        """What one of several attention workers is told."""
        return replace(self, attention_index=index, attention_cores=cores)

    @property
    def is_monolithic(self) -> bool:
        """Whether the cache lies in the dense process."""
        return not self.attention_cores

    def config(self) -> Config:
        """The configuration both roles would have."""
        return Config.model_validate(
            {
                "model": {"path": self.model, "dtype": self.dtype},
                "dense": {
                    "threads": max(1, len(self.dense_cores)),
                    "micro_batches": self.micro_batches,
                    "step_tokens": self.step_tokens,
                    "local_arena": self.arena_bytes if self.is_monolithic else 0,
                },
                "attention": {
                    "replicas": 0 if self.is_monolithic else self.attention_workers,
                    "threads": max(1, len(self.attention_cores)),
                    "arena": self.arena_bytes,
                    "lease_ms": _LEASE_MS,
                    "prefix_sharing": self.prefix_sharing,
                },
                "placement": {"shard_tokens": self.shard_tokens},
                "lanes": {} if self.spins else {"spin_us": 0},
            }
        )

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepSettings:
        """From a command line."""
        fields = json.loads(text)
        for name in ("dense_cores", "attention_cores"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one mode is asked to do: decode a batch of contexts for so many steps."""

    batch: int
    context_tokens: int
    steps: int
    traced: bool = False

    @property
    def name(self) -> str:
        """Batch x context."""
        return f"{self.batch}x{self.context_tokens}"
