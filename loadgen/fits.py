"""Named workloads: what was fitted to published traces, whose files are not shipped here.

`fits.toml` holds, for each, quantiles of prompt and output lengths, rate and variation of arrivals and, where
prompts share prefixes, quantiles of the shared part. Prompt and output lengths are drawn apart: their rank
correlation is below 0.08 in all three. `anabranch loadgen fit NAME FILE` makes an entry from its trace.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidRequest
from loadgen.arrivals import Gamma, spread
from loadgen.lengths import Quantiles
from loadgen.traces import Trace
from loadgen.workload import Row, stream

LEVELS = (
    0.0, 0.001, 0.005, 0.01, 0.02, 0.05, *(step / 20 for step in range(2, 19)),
    0.925, 0.95, 0.965, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0,
)  # fmt: skip
"""Where quantiles are kept: denser in the tails, which carry much of the mean."""


@dataclass(frozen=True, slots=True)
class Fit:
    """One workload. `prompt_tokens`, `output_tokens` and `shared` are values at LEVELS."""

    name: str
    requests: int
    """Of the trace it was fitted to."""
    rate: float
    """Requests per second."""
    cv: float
    """Coefficient of variation of the gaps between arrivals."""
    prompt_tokens: tuple[float, ...]
    output_tokens: tuple[float, ...]
    block_tokens: int = 0
    shared: tuple[float, ...] = ()
    """Share of a prompt's blocks that an earlier prompt began with; each prompt is counted by its blocks, so
    that the mean is the share an infinite cache would have. Empty where the trace does not tell contents.
    """

    @property
    def arrivals(self) -> Gamma:
        """Arrivals as in the trace."""
        return Gamma(self.rate, self.cv)

    @property
    def label(self) -> str:
        """What a report says of it: that it is a fit."""
        return f"{self.name} (fitted to the {self.requests:,} requests of the trace, not the trace itself)"

    def rows(self, seed: int, count: int) -> list[Row]:
        """`count` drawn requests."""
        prompts = Quantiles(LEVELS, self.prompt_tokens).draw(stream(seed, "prompts"), count).tolist()
        outputs = Quantiles(LEVELS, self.output_tokens).draw(stream(seed, "outputs"), count).tolist()
        if not self.shared:
            return [Row(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        shares = Quantiles(LEVELS, self.shared).shares(stream(seed, "shares"), count)
        blocks = _shared_blocks([-(-prompt // self.block_tokens) for prompt in prompts], shares, seed)
        return [
            Row(prompt, output, blocks=names, block_tokens=self.block_tokens)
            for prompt, output, names in zip(prompts, outputs, blocks, strict=True)
        ]


def named(name: str) -> Fit:
    """The fit of a name. Raises InvalidRequest, naming those there are."""
    entries = tomllib.loads((files("loadgen") / "fits.toml").read_text("utf-8"))
    if name not in entries:
        raise InvalidRequest(f"no workload is named {name!r}; there are {', '.join(entries)}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entries[name].items()
    }
    return Fit(name=name, **values)


def fitted(name: str, trace: Trace) -> Fit:
    """The fit of a trace with times."""
    gaps_s = np.diff(spread(np.array(trace.times_s()), stream(0, "spread")))
    blocks = [row.blocks for row in trace.rows]
    has_blocks = any(blocks)
    return Fit(
        name=name,
        requests=len(trace.rows),
        rate=_short(1 / gaps_s.mean()),
        cv=_short(gaps_s.std() / gaps_s.mean()),
        prompt_tokens=_quantiles(np.array([row.prompt_tokens for row in trace.rows])),
        output_tokens=_quantiles(np.array([row.output_tokens for row in trace.rows])),
        block_tokens=trace.rows[0].block_tokens if has_blocks else 0,
        shared=_shared_quantiles(blocks) if has_blocks else (),
    )


def to_toml(fit: Fit) -> str:
    """A fit as `fits.toml` has it."""
    lines = [f"[{fit.name}]", f"requests = {fit.requests}", f"rate = {fit.rate}", f"cv = {fit.cv}"]
    if fit.block_tokens:
        lines.append(f"block_tokens = {fit.block_tokens}")
    lines += [
        f"{key} = [{', '.join(f'{value:g}' for value in values)}]"
        for key in ("prompt_tokens", "output_tokens", "shared")
        if (values := getattr(fit, key))
    ]
    return "\n".join(lines) + "\n"


def _quantiles(lengths: NDArray[np.int64]) -> tuple[float, ...]:
    return tuple(_short(value) for value in np.quantile(lengths, LEVELS))


def _shared_quantiles(prompts: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Quantiles of the share of known leading blocks, each prompt weighing as many as it has."""
    seen: set[int] = set()
    shares: list[float] = []
    for blocks in prompts:
        known = next((place for place, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        shares += [known / len(blocks)] * len(blocks)
    return tuple(_short(value) for value in np.quantile(shares, LEVELS))


def _shared_blocks(counts: Sequence[int], shares: NDArray[np.float64], seed: int) -> list[tuple[int, ...]]:
    """Names of blocks of prompts that begin as some earlier prompt does, drawn among those long enough."""
    random = stream(seed, "ancestors")
    made: list[tuple[int, ...]] = []
    by_length: list[tuple[int, int]] = []  # (blocks, which prompt), ascending
    fresh = 0
    for count, share, choice in zip(counts, shares, random.random(len(counts)), strict=True):
        known = min(round(count * share), by_length[-1][0] if by_length else 0)
        blocks: tuple[int, ...] = ()
        if known:
            first = bisect_left(by_length, (known, 0))
            ancestor = by_length[first + int(choice * (len(by_length) - first))][1]
            blocks = made[ancestor][:known]
        blocks += tuple(range(fresh, fresh + count - known))
        fresh += count - known
        entry = (count, len(made))
        by_length.insert(bisect_left(by_length, entry), entry)
        made.append(blocks)
    return made


def _short(value: float) -> float:
    """Six digits: what `fits.toml` holds is what a fit gives."""
    return float(f"{value:g}")
