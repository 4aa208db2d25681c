"""The commands of `anabranch loadgen`, which is also the program `loadgen`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from anabranch.cli.generate import INTERRUPTED_STATUS
from anabranch.cli.loadgen import options as o
from anabranch.cli.loadgen.checking import check
from anabranch.cli.loadgen.concurrency import numbers
from anabranch.cli.loadgen.planning import plan
from anabranch.cli.loadgen.recording import Recorder, stopping
from anabranch.cli.loadgen.reporting import compare, report
from anabranch.cli.loadgen.simulate import simulate
from anabranch.cli.loadgen.study.command import study
from anabranch.cli.loadgen.sweep.command import app as sweep
from anabranch.cli.loadgen.table import WIDTH, print_summary
from anabranch.cli.options import Address, ApiKey, Authority, ConfigFile
from loadgen import fits, traces
from loadgen.drivers.interface import Target
from loadgen.measurement import Measurement, Settings
from loadgen.metrics import Objectives, Summary
from loadgen.pool import StopSwitch
from loadgen.prompts import PromptKind
from loadgen.results import PAGE
from loadgen.scenario import Scenario

app = typer.Typer(
    name="loadgen",
    help="Put a load on a cluster, or on any OpenAI-compatible endpoint, and report what came of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(report)
app.command()(compare)
app.command()(check)


@app.command()
def run(
    address: Address = None,
    api_key: ApiKey = None,
    authority: Authority = None,
    config_file: ConfigFile = None,
    openai: o.OpenAi = None,
    model: o.Model = "",
    timeout_s: o.TimeoutS = 600.0,
    honour_eos: o.HonourEos = False,
    arrivals: o.Arrivals = None,
    rate: o.Rate = None,
    rate_end: o.RateEnd = None,
    cv: o.Cv = None,
    concurrency: o.Concurrency = "",
    requests: o.Requests = None,
    duration: o.Duration = None,
    warm_up: o.WarmUp = 0.0,
    think: o.Think = 0.0,
    workload: o.Workload = "",
    trace_file: o.TraceFile = None,
    trace_from: o.TraceFrom = 0.0,
    prompt: o.Prompt = "512",
    output: o.Output = "128",
    length_scale: o.LengthScale = 1.0,
    context: o.Context = None,
    turns: o.Turns = 1,
    text: o.Text = False,
    vocabulary: o.Vocabulary = None,
    slo: o.Slo = "",
    shape: o.Shape = "",
    prices: o.PricesFile = None,
    dilation: o.Dilation = None,
    senders: o.Senders = 2,
    seed: o.LoadSeed = 0,
    out: o.Out = None,
) -> None:
    """Send requests as planned by a seed, and print latencies, rates, and how straight the ruler was.

    Ctrl-C hangs up and reports what there is. Every request is a line of OUT/requests.jsonl, every stage one
    of OUT/summary.jsonl, under the keys of `vllm bench serve`; OUT/report.html shows it all.

    \b
    anabranch loadgen run --rate 2 --duration 60 --prompt 256 --output 64
    anabranch loadgen run --workload azure-conv --rate 0.5 --context 2048 --warm-up 10
    anabranch loadgen run --concurrency 1,4,16 --requests 64 --prompt uniform:64:512
    anabranch loadgen run --trace-file conversation_trace.jsonl --length-scale 0.05 --duration 300
    anabranch loadgen run --rate 2 --slo ttft:500,tpot:50 --shape dense=1xh100,attention=2xh20
    anabranch loadgen run --openai http://127.0.0.1:8000 --text --rate 2
    """
    is_text = text or (openai is not None and vocabulary is None)
    scenario = Scenario(
        seed=seed, arrivals=arrivals, rate=rate, rate_end=rate_end, cv=cv, concurrency=numbers(concurrency),
        requests=requests, duration_s=duration, warm_up_s=warm_up, workload=workload, trace_file=trace_file,
        trace_from_s=trace_from, prompt=prompt, output=output, length_scale=length_scale, context=context,
        turns=turns, think_s=think, prompts=PromptKind.TEXT if is_text else PromptKind.TOKENS,
    )  # fmt: skip
    addresses, tls = o.endpoints(address, authority, config_file, openai)
    target = Target(addresses, openai or "", model, api_key, tls, timeout_s, ignore_eos=not honour_eos)
    settings = Settings(senders, Objectives.parse(slo), vocabulary, o.bill(shape, prices), dilation)
    raise typer.Exit(_measure(Measurement(scenario, target, settings), out))


app.command()(simulate)
app.command()(plan)
app.command()(study)
app.add_typer(sweep, name="sweep")


@app.command()
def fit(
    name: Annotated[str, typer.Argument(help="Name of the workload.")],
    trace_file: Annotated[Path, typer.Argument(help="A trace with times.", exists=True, dir_okay=False)],
) -> None:
    """Print the fit of a trace, as loadgen/fits.toml holds those of the named workloads.

    \b
    anabranch loadgen fit azure-conv AzureLLMInferenceTrace_conv.csv
    """
    print(fits.to_toml(fits.fitted(name, traces.read(trace_file))), end="")


def _measure(measurement: Measurement, out: Path | None) -> int:
    console, errors = Console(), Console(stderr=True)
    console.width = max(console.width, WIDTH)
    folder = out or Path(time.strftime("loadgen-%Y%m%d-%H%M%S"))
    plan = measurement.plan
    planned = ", ".join(f"{name.replace('_', ' ')} {value:,.4g}" for name, value in plan.workload.items())
    for line in (f"{measurement.endpoint.model}: {planned}", *(f"note: {note}" for note in plan.notes)):
        errors.print(line, highlight=False, markup=False, soft_wrap=True)
    with (
        contextlib.closing(StopSwitch()) as stop,
        errors.status("starting the senders") as status,
        stopping(stop),
    ):
        summaries = Recorder(errors, status, stop).measure(measurement, folder)
    for summary in summaries:
        print_summary(console, summary)
    console.print(f"\nwritten to {folder}; look at {folder / PAGE}", highlight=False, markup=False)
    return INTERRUPTED_STATUS if measurement.was_stopped else _status(summaries)


def _status(summaries: list[Summary]) -> int:
    """1 where a stage has no answer to show."""
    return 0 if all(summary["completed"] for summary in summaries) else 1
