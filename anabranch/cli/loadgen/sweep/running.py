"""`anabranch loadgen sweep run`: loads on a cluster, or any OpenAI-compatible endpoint, that runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console

from anabranch.cli.loadgen import options as o
from anabranch.cli.loadgen.recording import Recorder, stopping
from anabranch.cli.loadgen.sweep import options as s
from anabranch.cli.loadgen.sweep.going import go_through
from anabranch.cli.options import Address, ApiKey, Authority, ConfigFile
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Summary
from loadgen.pool import StopSwitch
from loadgen.prompts import PromptKind
from loadgen.scenario import Scenario
from loadgen.sweep.measured import measured
from loadgen.sweep.results import SweepFolder
from loadgen.sweep.sweep import Subject


def run(
    address: Address = None,
    api_key: ApiKey = None,
    authority: Authority = None,
    config_file: ConfigFile = None,
    openai: o.OpenAi = None,
    model: o.Model = "",
    timeout_s: o.TimeoutS = 600.0,
    honour_eos: o.HonourEos = False,
    rates: s.Rates = "",
    concurrency: s.Concurrency = "",
    saturate: s.Saturate = None,
    first: s.From = 1.0,
    precision: s.Precision = 0.05,
    slo: o.Slo = "",
    attain: s.Attain = 0.9,
    maximise: s.Maximise = "",
    arrivals: o.Arrivals = None,
    cv: o.Cv = None,
    requests: o.Requests = None,
    duration: o.Duration = None,
    warm_up: o.WarmUp = 0.0,
    think: o.Think = 0.0,
    workload: o.Workload = "",
    trace_file: o.TraceFile = None,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    length_scale: o.LengthScale = 1.0,
    context: o.Context = None,
    turns: o.Turns = 1,
    text: o.Text = False,
    vocabulary: o.Vocabulary = None,
    shape: o.Shape = "",
    prices: o.PricesFile = None,
    senders: o.Senders = 2,
    seed: o.LoadSeed = 0,
    out: s.Out = None,
) -> None:
    """Sweep loads on what runs: by default, up to the highest rate that is borne.

    \b
    anabranch loadgen sweep run --saturate rate --slo ttft:500,tpot:60 --duration 60
    anabranch loadgen sweep run --concurrency 1,4,16,64 --shape dense=1xh100,attention=2xh20
    anabranch loadgen sweep run --openai http://127.0.0.1:8000 --rates 0.5,1,2
    """
    is_text = text or (openai is not None and vocabulary is None)
    scenario = Scenario(
        seed=seed, arrivals=arrivals, cv=cv, requests=requests, duration_s=duration,
        warm_up_s=warm_up, workload=workload,
        trace_file=trace_file, prompt=prompt, output=output, length_scale=length_scale, context=context,
        turns=turns, think_s=think, prompts=PromptKind.TEXT if is_text else PromptKind.TOKENS,
    )  # fmt: skip
    load = (rates, concurrency, saturate, first, precision)
    wishes = s.wishes(load, (slo, attain, maximise), seed, out)
    addresses, tls = o.endpoints(address, authority, config_file, openai)
    target = Target(addresses, openai or "", model, api_key, tls, timeout_s, ignore_eos=not honour_eos)
    how = Settings(senders, wishes.standard.objectives, vocabulary, o.bill(shape, prices))
    cluster = RealCluster(lambda _settings, _console: nullcontext(target), how)
    raise typer.Exit(sweep_real(wishes, scenario, {target.place: cluster}))


@dataclass(frozen=True, slots=True)
class RealCluster:
    """One that can be had, with what it is set to."""

    reached: Callable[[Mapping[str, Any], Console], AbstractContextManager[Target]]
    """A target that serves while it is entered. Raises an error of cluster.errors."""
    how: Settings
    """How it is measured."""


def sweep_real(wishes: s.Wishes, scenario: Scenario, clusters: Mapping[str, RealCluster]) -> int:
    """The whole sweep over what is really asked, by name; returns the exit status."""
    errors = Console(stderr=True)
    with (
        contextlib.closing(StopSwitch()) as stop,
        SweepFolder(wishes.folder) as folder,
        errors.status("starting the senders") as status,
        stopping(stop),
    ):
        recorder = Recorder(errors, status, stop)

        def measure(measurement: Measurement) -> list[Summary]:
            return recorder.measure(measurement, folder.next_run())

        def make(name: str, settings: Mapping[str, Any]) -> Subject:
            cluster = clusters[name]
            return measured(name, settings, lambda: cluster.reached(settings, errors), cluster.how, measure)

        return go_through(wishes, scenario, tuple(clusters), make, folder, errors, lambda: not stop.is_set)
