"""`anabranch loadgen sweep simulate`: hardware that is modelled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from anabranch.cli.loadgen import modelled as m
from anabranch.cli.loadgen import options as o
from anabranch.cli.loadgen.simulate import engine_config
from anabranch.cli.loadgen.sweep import options as s
from anabranch.cli.loadgen.sweep.going import go_through
from anabranch.cli.loadgen.watching import SimulationLine
from anabranch.cli.up import parse_settings
from cluster.hardware import Catalogue
from cluster.signals import Interrupts
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, parse_side
from loadgen.simulation.models import SimulatedModel
from loadgen.simulation.simulation import SimulatedCluster
from loadgen.sweep.results import SweepFolder
from loadgen.sweep.simulated import simulated
from loadgen.sweep.sweep import Subject

_ALONE = "none"

Dense = Annotated[
    str,
    typer.Option(
        metavar="KINDxN[,...]", help="Devices of a dense worker.", rich_help_panel="Clusters and settings"
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        metavar="KINDxN[,...]",
        help="Attention workers, each with each of --dense; none: the cache lies beside the weights.",
        rich_help_panel="Clusters and settings",
    ),
]


def simulate(
    model: m.ModelShapeName = "llama3-70b",
    dense: Dense = "h100x2",
    attention: Attention = _ALONE,
    dense_workers: m.DenseWorkers = 1,
    hardware_file: m.Hardware = None,
    prices: o.PricesFile = None,
    config_file: m.EngineConfig = None,
    settings: m.EngineSettings = None,
    vary: s.Vary = None,
    search: s.Search = None,
    rates: s.Rates = "",
    concurrency: s.Concurrency = "",
    saturate: s.Saturate = None,
    first: s.From = 1.0,
    precision: s.Precision = 0.05,
    slo: o.Slo = "",
    attain: s.Attain = 0.9,
    maximise: s.Maximise = "",
    efficiency: m.EfficiencyText = "",
    prompts_elsewhere: m.PromptsElsewhere = False,
    timeout_s: o.TimeoutS = 600.0,
    arrivals: o.Arrivals = None,
    cv: o.Cv = None,
    requests: o.Requests = None,
    duration: o.Duration = None,
    warm_up: o.WarmUp = 0.0,
    think: o.Think = 0.0,
    workload: m.Workload = "",
    trace_file: o.TraceFile = None,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    length_scale: o.LengthScale = 1.0,
    context: o.Context = None,
    turns: o.Turns = 1,
    seed: o.LoadSeed = 0,
    out: s.Out = None,
) -> None:
    """Sweep modelled clusters: the load each bears, and tokens per dollar over latency.

    \b
    anabranch loadgen sweep simulate --dense h100x4 --rates 4,8,16,32 --trace azure-conv
    anabranch loadgen sweep simulate --dense h100x2,h100x4 --attention none,h20x4 --slo tpot:60 --duration 30
    anabranch loadgen sweep simulate --attention h20x4 --slo tpot:60 --search 40 \\
        --vary dense.step_tokens=256..8192 --vary dense.max_batch=64..1024
    """
    workload, trace_file = m.workload_source(workload, trace_file)
    scenario = Scenario(
        seed=seed, arrivals=arrivals, cv=cv, requests=requests, duration_s=duration,
        warm_up_s=warm_up, workload=workload,
        trace_file=trace_file, prompt=prompt, output=output, length_scale=length_scale, context=context,
        turns=turns, think_s=think,
    )  # fmt: skip
    load = (rates, concurrency, saturate, first, precision)
    wishes = s.wishes(load, (slo, attain, maximise), seed, out, vary, search)
    shapes = _shapes(dense, attention, dense_workers, m.catalogue(hardware_file, prices))
    modelled = _Modelled(
        models.resolve(model),
        config_file,
        parse_settings(settings or []),
        Efficiencies.parse(efficiency),
        prompts_elsewhere,
    )
    raise typer.Exit(_sweep(wishes, scenario, shapes, modelled, timeout_s))


@dataclass(frozen=True, slots=True)
class _Modelled:
    """All that the clusters of a sweep have alike."""

    model: SimulatedModel
    config_file: Path | None
    settings: Mapping[str, Any]
    efficiencies: Efficiencies
    prompts_elsewhere: bool

    def built(self, shape: Shape, settings: Mapping[str, Any]) -> SimulatedCluster:
        """Raises InvalidRequest for a shape without room for the weights, ConfigError for wrong settings."""
        config = engine_config(self.config_file, {**self.settings, **settings}, self.prompts_elsewhere)
        return SimulatedCluster(
            self.model, shape, config, self.efficiencies, prompts_elsewhere=self.prompts_elsewhere
        )


def _shapes(dense: str, attention: str, dense_workers: int, catalogue: Catalogue) -> dict[str, Shape]:
    """Every combination, by its name."""
    shapes = (
        Shape(
            parse_side(first, catalogue),
            None if second == _ALONE else parse_side(second, catalogue),
            dense_workers,
        )
        for first in dense.split(",")
        for second in attention.split(",")
    )
    return {str(shape): shape for shape in shapes}


def _sweep(
    wishes: s.Wishes, scenario: Scenario, shapes: Mapping[str, Shape], modelled: _Modelled, timeout_s: float
) -> int:
    errors = Console(stderr=True)
    for words in m.prices_of(shapes.values()):
        errors.print(words, markup=False, highlight=False, soft_wrap=True)
    with SweepFolder(wishes.folder) as folder, errors.status("simulating") as status:
        line = SimulationLine(errors, status)

        def make(cluster: str, settings: Mapping[str, Any]) -> Subject:
            objectives = wishes.standard.objectives
            return simulated(shapes[cluster], settings, modelled.built, objectives, timeout_s, line.goes_on)

        with Interrupts(line.stop, lambda _: None):
            return go_through(
                wishes, scenario, tuple(shapes), make, folder, errors, lambda: not line.is_stopped
            )
