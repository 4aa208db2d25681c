"""`anabranch loadgen plan`: which shape to buy for a model, a workload, prices and objectives."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from anabranch.cli.loadgen import modelled as m
from anabranch.cli.loadgen import options as o
from cluster import hardware
from cluster.hardware import Catalogue
from loadgen import scenario as scenarios
from loadgen.metrics import Objectives
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.advice import Advice, Candidate, advise
from loadgen.simulation.capacity import Point, Setting, Traffic
from loadgen.simulation.machines import Efficiencies
from loadgen.simulation.steps import Switches

_WIDTH = 140
_DRAWN_REQUESTS = 5000
"""Of a fit or of distributions, for their means."""

Kinds = Annotated[
    str,
    typer.Option(metavar="KIND[,...]", help="Only this hardware; default: all of the catalogue."),
]
Shown = Annotated[int, typer.Option(help="Shapes shown of each way.", min=1)]


def plan(
    model: m.ModelShapeName = "llama3-70b",
    prices: m.Prices = None,
    kinds: Kinds = "",
    shown: Shown = 3,
    efficiency: m.EfficiencyText = "",
    overlap: m.Overlap = True,
    stagger: m.Stagger = True,
    prompts_elsewhere: m.PromptsElsewhere = False,
    workload: m.Workload = "",
    trace_file: o.TraceFile = None,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    rate: o.Rate = None,
    context: o.Context = None,
    slo: o.Slo = "",
    seed: o.LoadSeed = 0,
) -> None:
    """Search devices for dense work and for attention over the catalogue, and say whether to disaggregate.

    In closed form, from rooflines and the means of the workload: at saturation, and at the largest batch
    whose mean latencies keep --slo. Queues and tails are left out; `simulate` has them, for one shape.

    \b
    anabranch loadgen plan --model llama3-70b --trace azure-conv --slo tpot:60
    anabranch loadgen plan --trace kimi-conv --kinds h100,h20 --prompts-elsewhere
    anabranch loadgen plan --model FOLDER --prices prices.toml --prompt 4096 --output 512 --rate 2
    """
    workload, trace_file = m.workload_source(workload, trace_file)
    is_drawn = trace_file is None
    scenario = Scenario(
        seed=seed,
        rate=rate or (None if workload or not is_drawn else 1.0),
        requests=_DRAWN_REQUESTS if is_drawn else None,
        workload=workload,
        trace_file=trace_file,
        prompt=prompt,
        output=output,
        context=context,
    )
    resolved = models.resolve(model)
    load = scenarios.plan(scenario, min(filter(None, (context, resolved.context_tokens))))
    traffic = Traffic.of_plan(load)
    setting = Setting(
        resolved, traffic, Efficiencies.parse(efficiency), Switches(overlap, stagger), prompts_elsewhere
    )
    catalogue = _only(hardware.load(str(prices) if prices else None), kinds)
    objectives = Objectives.parse(slo)
    console = Console()
    console.width = max(console.width, _WIDTH)
    for note in load.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    is_asked = rate is not None or bool(workload) or not is_drawn
    _print(console, advise(catalogue, setting, objectives, shown), setting, is_asked=is_asked)


def _only(catalogue: Catalogue, kinds: str) -> Catalogue:
    names = [name for name in kinds.split(",") if name]
    hardware.require(names, catalogue)
    return {name: item for name, item in catalogue.items() if not names or name in names}


def _print(console: Console, advice: Advice, setting: Setting, *, is_asked: bool) -> None:
    traffic = setting.traffic
    where = "elsewhere" if setting.prompts_elsewhere else "on the same cluster"
    console.print(
        f"{setting.model.name}: prompts of {traffic.prompt_tokens:,.1f} tokens, computed {where}, outputs of "
        f"{traffic.output_tokens:,.1f}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("shape", "$/h", "at saturation", "within the objectives", "limited by", "clusters"):
        table.add_column(column)
    for candidate in (*advice.homogeneous, *advice.disaggregated):
        table.add_row(*_row(candidate, traffic, is_asked=is_asked))
    console.print(table)
    console.print("* cannot be deployed yet: a dense worker is one device today", highlight=False)
    if is_asked and traffic.rate is not None:
        console.print(
            f"clusters: how many the workload's own {traffic.rate:.2f} requests/s need", highlight=False
        )
    console.print(advice.verdict, highlight=False, markup=False, soft_wrap=True)


def _row(candidate: Candidate, traffic: Traffic, *, is_asked: bool) -> tuple[str, ...]:
    shape, clusters = candidate.shape, "-"
    mark = "" if shape.is_deployable else " *"
    if is_asked and traffic.rate is not None:
        clusters = f"{traffic.rate * traffic.output_tokens / candidate.chosen.tokens_per_s:.2f}"
    return (
        f"{shape}{mark}",
        f"{shape.price_per_hour_usd:.2f}",
        _point(candidate.saturated, traffic),
        "-" if candidate.within is None else _point(candidate.within, traffic),
        candidate.bottleneck,
        clusters,
    )


def _point(point: Point, traffic: Traffic) -> str:
    return (
        f"{point.tokens_per_s:,.0f} tok/s, {point.tokens_per_s / traffic.output_tokens:.2f} req/s, batch "
        f"{point.batch:.0f},\nTPOT {point.step_s * 1000:.1f} ms, ${point.usd_per_mtok:.3f}/Mtok"
    )
