"""`anabranch bench step`: decoding steps, all on one side and split over two, and what lies between them.

Real engines and a real attention worker in processes of their own, without Ray: `monolithic` on all cores,
`one_core` monolithic on one, `split` with one core for dense work and one for attention. They take turns;
caches are filled without computing them (`filling`), so that any context is there in a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from anabranch.cli.bench import random_model, step_attention, step_dense
from anabranch.cli.bench.children import next_line, start
from anabranch.cli.bench.floors import Floors
from anabranch.cli.bench.records import Record, Results, extreme, figure, prediction, ratio
from anabranch.cli.bench.step_settings import StepSettings, Turn
from anabranch.cli.bench.timeline import draw, require_plotting
from anabranch.cli.model import resolve
from cluster.errors import AnabranchError, ConfigError

_MODEL = "smollm2-135m-instruct"
_SMALL = Turn(1, 128, 16)
_OVERHEAD = Turn(8, 128, 16)
_LARGE = Turn(8, 4096, 16)
_LONG = Turn(16, 2048, 16)
_TURNS = (_SMALL, _OVERHEAD, _LARGE, _LONG)

Answer = Callable[[Turn], dict[str, Any]]
Say = Callable[[str], None]


@dataclass
class ModeSamples:
    """Steps of one mode in one shape, over all its turns."""

    steps: list[dict[str, float]] = field(default_factory=list)
    products_s: list[float] = field(default_factory=list)
    computed_s: list[float] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)

    def of(self, *parts: str) -> list[float]:
        """The sum of some parts, per step."""
        return [sum(step[part] for part in parts) for step in self.steps]

    def middle(self, part: str) -> float:
        """The median of a part."""
        return median(self.of(part))


Samples = Mapping[tuple[str, str], ModeSamples]
"""(mode, batch x context) -> its steps."""


def measure(repeats: int, say: Say, plot: Path | None = None) -> Results:
    """Steps of all modes, in turn, and what they say: `step` and `gain`. Raises ConfigError on one core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("bench step needs two cores: one for each side")
    if plot is not None:
        require_plotting()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_model())
        say("measuring memory and matrix products for the floors")
        floors = Floors.measure(folder, "bfloat16", 2)
        modes = _modes(stack, str(folder), cores)
        samples = _take_turns(modes, repeats, say)
    if plot is not None:
        title = f"two steps of {_LARGE.name}, one core for dense work and one for attention"
        draw(samples["split", _LARGE.name].trace, plot, title)
    settings = {"model": folder.name, "dtype": "bfloat16", "cores": cores[:2], "repeats": repeats}
    return _results(samples, settings, floors)


def _take_turns(modes: Mapping[str, Answer], repeats: int, say: Say) -> Samples:
    """Every mode in every shape, `repeats` times in turn."""
    samples: dict[tuple[str, str], ModeSamples] = {}
    for repeat in range(repeats):
        for turn in _TURNS:
            for mode, answer in modes.items():
                say(f"{repeat + 1} of {repeats}: {mode} {turn.name}")
                traced = Turn(turn.batch, turn.context_tokens, turn.steps, traced=mode == "split")
                found = answer(traced)
                kept = samples.setdefault((mode, turn.name), ModeSamples())
                kept.steps += found["steps"]
                kept.products_s += found["products_s"]
                kept.computed_s += found["computed_s"]
                kept.trace = found["trace"]
    return samples


def _results(samples: Samples, settings: Mapping[str, Any], floors: Floors) -> Results:
    steps = {
        f"{mode}_{turn.name}": figure(
            samples[mode, turn.name].of("wall_s"),
            "s",
            floor=floors.step(turn.batch, turn.context_tokens, mode),
            settings=settings,
        )
        for turn in _TURNS
        for mode in ("monolithic", "split", "one_core")
    }
    split, whole = samples["split", _LARGE.name], samples["monolithic", _LARGE.name]
    one_core = samples["one_core", _LARGE.name]
    small = samples["one_core", _OVERHEAD.name]
    spent = [sum(parts) for parts in zip(small.computed_s, small.of("attention_s"), strict=True)]
    return {
        "step": {
            "seconds": steps,
            "sides": _sides(split),
            "remote_vs_monolithic_1x128": ratio(
                ("split", samples["split", _SMALL.name].of("wall_s")),
                ("monolithic", samples["monolithic", _SMALL.name].of("wall_s")),
                "s",
                at_most=2.0,
                settings=settings,
            ),
            "bottleneck_busy": _worst(samples, _busy, settings, at_least=0.85),
            "hidden_share": _worst(samples, _hidden, settings, at_least=0.8),
            "tax": ratio(
                ("split", split.of("wall_s")), ("monolithic", whole.of("wall_s")), "s", settings=settings
            ),
            "tax_predicted": _predicted(split, whole, "tax"),
            "overhead_share": ratio(
                ("layers, head and attention", spent),
                ("step", small.of("wall_s")),
                "s",
                complement=True,
                at_most=0.15,
                settings=settings,
            ),
        },
        "gain": {
            "attention_worker": ratio(
                ("one core, monolithic", one_core.of("wall_s")),
                ("one core each side", split.of("wall_s")),
                "s",
                settings=settings,
            ),
            "predicted": _predicted(split, one_core, "gain"),
        },
    }


def _worst(
    samples: Samples,
    of: Callable[[ModeSamples, Mapping[str, Any]], Record],
    settings: Mapping[str, Any],
    at_least: float,
) -> Record:
    """The least of a share over the shapes in which both sides have something to do."""
    shapes = {turn.name: of(samples["split", turn.name], settings) for turn in (_LARGE, _LONG)}
    return extreme("least", shapes, at_least=at_least)


def _busy(split: ModeSamples, settings: Mapping[str, Any]) -> Record:
    """Kernels or matrix products of the busier side over the step."""
    products, attention = split.products_s, split.of("attention_s")
    busier = ("attention", attention) if median(attention) > median(products) else ("dense", products)
    return ratio(busier, ("step", split.of("wall_s")), "s", settings=settings)


def _hidden(split: ModeSamples, settings: Mapping[str, Any]) -> Record:
    """What of attention and lanes dense work covered."""
    waiting = ("dense waiting", split.of("waited_s"))
    elsewhere = ("attention and lanes", split.of("attention_s", "lane_s"))
    return ratio(waiting, elsewhere, "s", complement=True, settings=settings)


def _sides(split: ModeSamples) -> Results:
    """Medians of what each side did."""
    parts = ("dense_s", "head_s", "waited_s", "sent_s", "attention_s", "lane_s")
    return {part.removesuffix("_s"): figure(split.of(part), "s") for part in parts}


def _predicted(split: ModeSamples, monolithic: ModeSamples, what: str) -> Record:
    """From the times of both sides by themselves: two equal micro-batches, staggered."""
    inputs = {
        "dense_s": split.middle("dense_s") + split.middle("sent_s"),
        "head_s": split.middle("head_s"),
        "attention_s": split.middle("attention_s"),
        "lane_s": split.middle("lane_s") / 2,
        "monolithic_s": monolithic.middle("wall_s"),
    }
    return prediction(f"staggered_{what}", inputs)


@contextlib.contextmanager
def _model() -> Iterator[Path]:
    """The real model's folder where it was fetched, else a random one of its shape."""
    with contextlib.ExitStack() as stack:
        try:
            path = resolve(_MODEL)
        except AnabranchError:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-bench-"))
            path = Path(name) / "smollm2-shaped-random"
            path.mkdir()
            random_model.write(path)
        yield path


def _modes(stack: contextlib.ExitStack, model: str, cores: Sequence[int]) -> dict[str, Answer]:
    """Start all processes; each mode answers turns."""
    first, second = cores[0], cores[1]
    split = StepSettings(model, (first,), (second,))
    port = int(start(stack, step_attention.__name__, split)[1])
    # Two micro-batches wherever there are two sequences: staggering is measured, not the choice of it.
    remote = StepSettings(model, (first,), (second,), attention_port=port, micro_batches=2)
    return {
        "monolithic": _dense(stack, StepSettings(model, (first, second))),
        "split": _dense(stack, remote),
        "one_core": _dense(stack, StepSettings(model, (first,))),
    }


def _dense(stack: contextlib.ExitStack, settings: StepSettings) -> Answer:
    process, _ = start(stack, step_dense.__name__, settings)

    def answer(turn: Turn) -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.write(json.dumps(asdict(turn)) + "\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(next_line(process))
        return found

    return answer
