"""`anabranch bench context`: what attention and its memory cost per token of context, from 1k to 256k tokens.

One sequence decodes over an arena as an attention worker has it: the seconds are those of all its layers. A
sample walks the same bytes at every length, in as many sequences as that takes, so that no length is read
from a cache. Memory is counted in pages of the arena that the system says are there: the last one, of 2 MiB,
belongs to whatever comes next, so layers are as many as make every length whole pages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from anabranch.cli.bench.records import Record, Results, extreme, figure, fits, prediction, ratio
from anabranch.cli.bench.turns import in_turn
from anabranch.cli.doctor import read_rate
from cluster.errors import InvalidRequest
from cluster.types import KvGeometry
from workers.attention.arena import Arena
from workers.kernels.select import select
from workers.kernels.signature import AttendResult, Span
from workers.partials import Partial, merge

LENGTHS = tuple(2**power for power in range(10, 19))
GEOMETRY = KvGeometry(
    layers=16, query_heads=9, kv_heads=3, head_size=64, dtype="bfloat16", block_tokens=32, digest="bench"
)
"""Sixteen of SmolLM2's thirty layers: 3 GiB at 256k tokens, more than caches hold."""

_ELEMENT_BYTES = 2
_MEMORY_OFF = 0.03
_FILL_TOKENS = 1024
_WORKERS = (2, 4, 8)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ContextBench:
    """What is measured: sequences of these lengths, in an arena as long as the longest, `repeats` samples of
    each in turn.
    """

    lengths: tuple[int, ...] = LENGTHS
    repeats: int = 7

    @property
    def most(self) -> int:
        """Tokens of the arena."""
        return max(self.lengths)


class FilledArena:
    """An arena of one sequence's tokens; what it holds in memory was looked at while it was filled."""

    def __init__(self, bench: ContextBench) -> None:
        self._kernel = select("auto", "cpu")
        blocks = bench.most // GEOMETRY.block_tokens
        self._arena = Arena(GEOMETRY, blocks, torch.device("cpu"), self._kernel.layout)
        self.resident_bytes = self._fill(bench)
        self._query = torch.randn(1, GEOMETRY.query_heads, GEOMETRY.head_size).to(torch.bfloat16)

    def attend(self, start: int, end: int) -> AttendResult:
        """One token over positions [start, end), whole blocks, in each layer; the last layer's result."""
        size = GEOMETRY.block_tokens
        blocks = tuple(range(start // size, end // size))
        span = Span(0, 1, end - start, blocks, 0, 0, end - start)
        scale = GEOMETRY.head_size**-0.5
        results = [
            self._kernel.attend(self._query, [span], self._arena.layer(layer), scale)
            for layer in range(GEOMETRY.layers)
        ]
        return results[-1]

    def _fill(self, bench: ContextBench) -> dict[int, int]:
        """Bytes of the arena in memory by tokens written, at each length."""
        shape = (_FILL_TOKENS, GEOMETRY.kv_heads, GEOMETRY.head_size)
        rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        found = {}
        for start in range(0, bench.most, _FILL_TOKENS):
            end = min(start + _FILL_TOKENS, bench.most)
            for layer in range(GEOMETRY.layers):
                part = rows[: end - start]
                self._arena.append(layer, torch.arange(start, end), part, part)
            if end in bench.lengths:
                found[end] = self._resident_bytes()
        return found

    def _resident_bytes(self) -> int:
        """Of the mapping the arena lies in, from the system's account of this process."""
        place = min(self._arena.layer(0).key.data_ptr(), self._arena.layer(0).value.data_ptr())
        return resident_bytes(place)


def resident_bytes(place: int) -> int:
    """Bytes in memory of the mapping that holds an address. Raises InvalidRequest where none does."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        begin, dash, end = name.partition("-")
        if dash and ":" not in name:
            inside = int(begin, 16) <= place < int(end, 16)
        elif inside and name == "Rss:":
            return 1024 * int(rest.split()[0])
    raise InvalidRequest(f"no mapping of this process holds {place:#x}")


def measure(bench: ContextBench, say: Say) -> Results:
    """`context`: seconds and bytes per token with the line through them, and what two workers change."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bandwidth = read_rate(1)
        say(f"filling {bench.most} tokens")
        arena = FilledArena(bench)
        say(f"attending {len(bench.lengths)} lengths, {bench.repeats} samples each")
        samplers = {str(length): partial(_walk, arena, bench.most, length) for length in bench.lengths}
        taken = in_turn(samplers, bench.repeats)
        say("one worker and two")
        workers = _side_by_side(arena, bench)
    finally:
        torch.set_num_threads(before)
    samples = {length: taken[str(length)] for length in bench.lengths}
    return summary(samples, arena.resident_bytes, workers, bandwidth)


def summary(
    samples: dict[int, list[float]],
    resident: dict[int, int],
    workers: dict[str, list[float]],
    bandwidth_bytes_per_s: float,
) -> Results:
    """Records of what was measured: seconds and resident bytes by tokens, seconds by number of workers."""
    memory = {str(tokens): _memory(tokens, held) for tokens, held in resident.items()}
    line = fits({float(tokens): taken for tokens, taken in samples.items()}, "s")
    inputs = {"base_s": line["intercept"]["value"], "each_s": line["slope"]["value"]}
    inputs["context_tokens"] = max(samples)
    speedup: Results = {
        f"predicted_{count}": prediction("sharding_speedup", inputs | {"workers": count})
        for count in _WORKERS
    }
    if workers:
        speedup["measured_2"] = ratio(("one worker", workers["one"]), ("two, half each", workers["two"]), "s")
    return {
        "context": {
            "seconds": {
                str(tokens): _seconds(tokens, taken, bandwidth_bytes_per_s)
                for tokens, taken in samples.items()
            },
            "line": line,
            "memory_vs_formula_min": extreme("least", memory, at_least=1 - _MEMORY_OFF),
            "memory_vs_formula_max": extreme("most", memory, at_most=1 + _MEMORY_OFF),
            "workers_speedup": speedup,
        }
    }


def _seconds(tokens: int, taken: Sequence[float], bandwidth_bytes_per_s: float) -> Record:
    read_bytes = tokens * _token_bytes()
    inputs = {"read_bytes": read_bytes, "bandwidth_bytes_per_s": bandwidth_bytes_per_s}
    return figure(taken, "s", floor=prediction("read_floor_s", inputs))


def _memory(tokens: int, held_bytes: int) -> Record:
    """Bytes per token found in memory over 2 x layers x KV heads x head size x element size."""
    return ratio(("in memory", [held_bytes / tokens]), ("formula", [float(_token_bytes())]), "bytes")


def _token_bytes() -> int:
    return 2 * GEOMETRY.layers * GEOMETRY.kv_heads * GEOMETRY.head_size * _ELEMENT_BYTES


def _walk(arena: FilledArena, most: int, length: int) -> float:
    """Seconds of a sequence of `length` tokens: all tokens of the arena, one sequence after the other."""
    began_s = perf_counter()
    for start in range(0, most, length):
        arena.attend(start, start + length)
    return (perf_counter() - began_s) * length / most


def _side_by_side(arena: FilledArena, bench: ContextBench) -> dict[str, list[float]]:
    """Seconds of the longest sequence on one core, and as two shards on a core each, merged; without lanes.
    Empty where there is one core only.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return {}
    most, half = bench.most, bench.most // 2
    with (
        ThreadPoolExecutor(1, initializer=_start, initargs=(cores[0],)) as first,
        ThreadPoolExecutor(1, initializer=_start, initargs=(cores[1],)) as second,
    ):

        def one() -> float:
            began_s = perf_counter()
            first.submit(arena.attend, 0, most).result()
            return perf_counter() - began_s

        def two() -> float:
            began_s = perf_counter()
            shards = first.submit(arena.attend, 0, half), second.submit(arena.attend, half, most)
            merge([Partial(found.out, found.lse) for found in (shard.result() for shard in shards)])
            return perf_counter() - began_s

        return in_turn({"one": one, "two": two}, bench.repeats)


def _start(core: int) -> None:
    """A worker's thread, kept on its core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
