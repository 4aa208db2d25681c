"""What a model's steps must take at least on this machine, from speeds measured beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from anabranch.cli.bench.records import Record, prediction
from anabranch.cli.doctor import read_rate
from cluster.model_spec import ModelSpec

_MATRIX = 1024
_PRODUCTS = 4


@dataclass(frozen=True, slots=True)
class Speed:
    """Of some cores: bytes read from memory per second, and FLOP per second of a large matrix product."""

    bandwidth_bytes_per_s: float
    flops_per_s: float

    @classmethod
    def measure(cls, threads: int, dtype: torch.dtype) -> Speed:
        """The best of a few tries, for a floor is what cannot be beaten."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            matrix = torch.ones(_MATRIX, _MATRIX, dtype=dtype)
            seconds = []
            for _ in range(_PRODUCTS):
                began_s = perf_counter()
                matrix @ matrix
                seconds.append(perf_counter() - began_s)
        finally:
            torch.set_num_threads(before)
        return cls(read_rate(threads), 2 * _MATRIX**3 / min(seconds))


@dataclass(frozen=True, slots=True)
class Floors:
    """Floors of one model; `whole`: the speed of all cores that a monolithic step has, `side`: of one."""

    parameters: int
    element_bytes: int
    token_bytes: int
    whole: Speed
    side: Speed

    @classmethod
    def measure(cls, folder: Path, dtype_name: str, threads: int) -> Floors:
        """For a model's folder. Raises ConfigError for a folder that is none."""
        spec, dtype = ModelSpec.from_folder(folder), getattr(torch, dtype_name)
        token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_size * dtype.itemsize
        whole = Speed.measure(min(threads, len(os.sched_getaffinity(0))), dtype)
        return cls(spec.parameters, dtype.itemsize, token_bytes, whole, Speed.measure(1, dtype))

    def step(self, batch: int, context_tokens: int, mode: str) -> Record:
        """Seconds of a decoding step: `monolithic` on all cores, `one_core` on one, else on one core a side;
        one sequence alone passes through the sides one after the other.
        """
        equation = "overlapped_floor_s" if self._is_split(mode) and batch > 1 else "decode_floor_s"
        speed = self.whole if mode == "monolithic" else self.side
        return prediction(
            equation,
            {
                "weight_bytes": self.parameters * self.element_bytes,
                "flop": 2 * self.parameters * batch,
                "cache_bytes": batch * context_tokens * self.token_bytes,
                "bandwidth_bytes_per_s": speed.bandwidth_bytes_per_s,
                "flops_per_s": speed.flops_per_s,
            },
        )

    def decode_rate(self, batch: int, context_tokens: int, mode: str) -> Record:
        """Tokens per second at most while a batch decodes."""
        floor_s = self.step(batch, context_tokens, mode)["value"]
        return prediction("rate_most", {"tokens": batch, "floor_s": floor_s})

    def prefill_rate(self, mode: str) -> Record:
        """Tokens per second of prompts at most: the weights' arithmetic alone."""
        speed = self.whole if mode == "monolithic" else self.side
        floor_s = 2 * self.parameters / speed.flops_per_s
        return prediction("rate_most", {"tokens": 1, "floor_s": floor_s})

    @staticmethod
    def _is_split(mode: str) -> bool:
        return mode not in ("monolithic", "one_core")
