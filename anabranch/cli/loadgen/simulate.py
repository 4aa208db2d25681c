"""`anabranch loadgen simulate`: a run on hardware that is modelled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from anabranch.cli.generate import INTERRUPTED_STATUS
from anabranch.cli.loadgen import modelled as m
from anabranch.cli.loadgen import options as o
from anabranch.cli.loadgen.concurrency import numbers
from anabranch.cli.loadgen.reporting import write_page
from anabranch.cli.loadgen.table import print_summary
from anabranch.cli.loadgen.watching import SimulationLine
from anabranch.cli.up import parse_settings
from cluster import config as configuration
from cluster.config import Config
from cluster.prices import per_mtok
from cluster.signals import Interrupts
from loadgen.metrics import Objectives, Summary
from loadgen.results import ResultsFolder
from loadgen.scenario import Scenario
from loadgen.simulation import models
from loadgen.simulation.machines import Efficiencies, Shape, parse_side
from loadgen.simulation.simulation import (
    LARGE,
    STEP_TOKENS_ELSEWHERE,
    SimulatedCluster,
    Simulation,
    require_obeyed,
)
from loadgen.simulation.steps import Switches

_WIDTH = 100


def simulate(
    model: m.ModelShapeName = "llama3-70b",
    dense: m.Dense = "h100x2",
    attention: m.Attention = None,
    dense_workers: m.DenseWorkers = 1,
    hardware_file: m.Hardware = None,
    prices: o.PricesFile = None,
    config_file: m.EngineConfig = None,
    settings: m.EngineSettings = None,
    efficiency: m.EfficiencyText = "",
    overlap: m.Overlap = True,
    stagger: m.Stagger = True,
    prompts_elsewhere: m.PromptsElsewhere = False,
    timeout_s: o.TimeoutS = 600.0,
    arrivals: o.Arrivals = None,
    rate: o.Rate = None,
    rate_end: o.RateEnd = None,
    cv: o.Cv = None,
    concurrency: o.Concurrency = "",
    requests: o.Requests = None,
    duration: o.Duration = None,
    warm_up: o.WarmUp = 0.0,
    think: o.Think = 0.0,
    workload: m.Workload = "",
    trace_file: o.TraceFile = None,
    trace_from: o.TraceFrom = 0.0,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    length_scale: o.LengthScale = 1.0,
    context: o.Context = None,
    turns: o.Turns = 1,
    slo: o.Slo = "",
    seed: o.LoadSeed = 0,
    out: o.Out = None,
) -> None:
    """Run this project's scheduler and placement over modelled hardware, on a virtual clock.

    The same results as of `run`, the page included. Steps take what rooflines say: throughput is what cannot
    be beaten, unless --efficiency says what your devices reach. Nothing ever fails.

    \b
    anabranch loadgen simulate --dense h100x2 --attention h20x4 --trace azure-conv
    anabranch loadgen simulate --dense h100x4 --trace azure-conv --efficiency flops=0.6,bandwidth=0.8
    anabranch loadgen simulate --model llama3-8b --dense h100 --attention l40sx4 --concurrency 1,16,256
    """
    workload, trace_file = m.workload_source(workload, trace_file)
    scenario = Scenario(
        seed=seed, arrivals=arrivals, rate=rate, rate_end=rate_end, cv=cv, concurrency=numbers(concurrency),
        requests=requests, duration_s=duration, warm_up_s=warm_up, workload=workload, trace_file=trace_file,
        trace_from_s=trace_from, prompt=prompt, output=output, length_scale=length_scale, context=context,
        turns=turns, think_s=think,
    )  # fmt: skip
    catalogue = m.catalogue(hardware_file, prices)
    shape = Shape(
        parse_side(dense, catalogue), parse_side(attention, catalogue) if attention else None, dense_workers
    )
    cluster = SimulatedCluster(
        models.resolve(model),
        shape,
        engine_config(config_file, parse_settings(settings or []), prompts_elsewhere),
        Efficiencies.parse(efficiency),
        Switches(overlap, stagger),
        prompts_elsewhere,
    )
    raise typer.Exit(_run(cluster, scenario, Objectives.parse(slo), timeout_s, out))


def engine_config(config_file: Path | None, settings: Mapping[str, Any], prompts_elsewhere: bool) -> Config:
    """The file's settings, or those that suit accelerators; and above them `settings`, by key. Raises
    InvalidRequest for one of these that would change nothing.
    """
    require_obeyed(settings)
    overrides = dict(LARGE) if config_file is None else {}
    if prompts_elsewhere:
        overrides["dense.step_tokens"] = STEP_TOKENS_ELSEWHERE
    return configuration.load(config_file, {**overrides, **settings})


def _run(
    cluster: SimulatedCluster, scenario: Scenario, objectives: Objectives, timeout_s: float, out: Path | None
) -> int:
    console, errors = Console(), Console(stderr=True)
    console.width = max(console.width, _WIDTH)
    simulation = Simulation(cluster, scenario, timeout_s)
    plan = simulation.plan
    planned = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in plan.workload.items())
    head = f"{cluster.model.name} on {cluster.shape}, {cluster.arena_tokens:,} tokens of cache in each arena"
    for line in (
        head,
        planned,
        *m.prices_of((cluster.shape,)),
        *(f"note: {note}" for note in (*plan.notes, *_notes(cluster))),
    ):
        errors.print(line, highlight=False, markup=False, soft_wrap=True)
    folder = out or Path(time.strftime("simulated-%Y%m%d-%H%M%S"))
    began_s = time.process_time()
    with ResultsFolder(folder) as results, errors.status("simulating") as status:
        progress = SimulationLine(errors, status)
        with Interrupts(progress.stop, lambda _: None):
            summaries = simulation.run(results.add, progress.goes_on, objectives, results.add_sample)
        results.sum_up(summaries)
        status.update("writing the page")
        write_page(folder)
    for summary in summaries:
        print_summary(console, summary)
        console.print(f"  {_cluster_line(summary)}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"\n{simulation.simulated_s:,.0f} s simulated in {time.process_time() - began_s:,.1f} s of "
        f"computing; written to {folder}",
        highlight=False,
        markup=False,
    )
    if simulation.was_stopped:
        return INTERRUPTED_STATUS
    return 0 if all(summary["completed"] for summary in summaries) else 1


def _notes(cluster: SimulatedCluster) -> list[str]:
    if cluster.shape.is_deployable:
        return []
    return ["this project cannot deploy the shape yet: a dense worker is one device today"]


def _cluster_line(summary: Summary) -> str:
    price_usd = summary["modelled"]["price_per_hour_usd"]
    usd = per_mtok(price_usd / 3600, summary["output_throughput"] or 0.0)
    cost = "" if usd is None else f", ${usd:.2f} per million output tokens"
    return (
        f"{summary['steps']:,} steps of {summary['mean_step_ms']:.1f} ms, batch "
        f"{summary['mean_batch_rows']:.0f} (most {summary['max_batch_rows']}); dense busy "
        f"{summary['dense_busy_share']:.0%}, busiest attention worker "
        f"{summary['attention_busy_share']:.0%}, pool {summary['mean_pool_used_share']:.0%} full; "
        f"${price_usd:.2f}/h{cost}"
    )
