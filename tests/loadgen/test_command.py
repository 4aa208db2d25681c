"""The command as a user runs it: files, tables, signals, and a real small cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from anabranch.v1 import inference_pb2
from cluster.errors import InvalidRequest
from loadgen.measurement import Measurement, Settings
from loadgen.records import Outcome
from loadgen.results import PAGE, ResultsFolder, read_records, read_run, read_summaries
from loadgen.scenario import Scenario
from tests.loadgen.paced import MODEL, GrpcServer, OpenAiServer, Script
from tests.loadgen.watching import Run
from tests.models import tiny_model
from tests.processes import ProcessCluster, process_cluster
from tests.serving import wait_until

PROGRAM = "from anabranch.cli.entry import loadgen; loadgen()"
"""What the console script `loadgen` does."""


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "run", *arguments]


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def _gateway(cluster: ProcessCluster) -> str:
    (address,) = (member.address for member in cluster.members() if member.role == inference_pb2.ROLE_GATEWAY)
    return address


def test_a_run_writes_its_requests_and_its_figures(tmp_path: Path) -> None:
    """Over OpenAI's API: a line for each request, a flat summary that is plain JSON, tables, and notes."""
    with OpenAiServer(Script(first_s=0.02, gap_s=0.005)) as server:
        done = _run(
            *("--openai", server.target.url, "--rate", "20", "--duration", "1", "--prompt", "8"),
            *("--output", "9000", "--context", "24", "--slo", "ttft:5000", "--out", "results"),
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stderr
    assert "clipped to the context of 24 tokens" in done.stderr
    (summary,) = read_summaries(tmp_path / "results")
    records = read_records(tmp_path / "results")
    assert len(records) == summary["completed"] == len(server.script.prompts) > 0
    assert all(isinstance(prompt, str) and len(prompt.split()) == 8 for prompt in server.script.prompts)
    assert {record.output_tokens for record in records} == {12}
    assert summary["request_goodput"] == summary["request_throughput"]
    assert (summary["model_id"], summary["backend"]) == (MODEL, "openai")
    for words in ("TTFT", "send lag", "Little's law", "busiest sender", "warning: p90 rests on"):
        assert words in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_still_gives_the_report(number: signal.Signals, tmp_path: Path) -> None:
    """Sent to the process and to its group, as `timeout` does: what ended is reported, the rest interrupted
    or unsent.
    """
    with GrpcServer(Script(first_s=0.01, gap_s=0.01, holds_from=4)) as server:
        address = server.target.addresses[0]
        process = subprocess.Popen(
            _command("--address", address, "--concurrency", "4", "--requests", "50", "--out", "results"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        requests = tmp_path / "results" / "requests.jsonl"
        wait_until(lambda: requests.exists() and requests.read_text().count("\n") == 4)
        process.send_signal(number)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "completed 4, failed 0, interrupted 4, unsent 42 of 50 planned" in stdout
    assert "concurrency 4: 0 s  sent" in stderr
    outcomes = [record.outcome for record in read_records(tmp_path / "results")]
    assert sorted(outcomes) == [Outcome.COMPLETED] * 4 + [Outcome.INTERRUPTED] * 4
    assert read_summaries(tmp_path / "results")[0]["interrupted"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "1", "--slo", "speed:1"], "there is no objective 'speed'"),
        (["--rate", "1", "--dilation", "40"], f"--dilation 40: {MODEL} says that its dilation is 1"),
        (["--concurrency", "few"], "--concurrency 'few'"),
        (["--rate", "1", "--model", "other"], f"there is no model 'other', but {MODEL}"),
        (["--rate", "1", "--out", "."], "cannot be a new folder"),
    ],
)
def test_what_the_user_can_correct_is_said_in_one_line(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    """And nothing is sent."""
    with GrpcServer() as server:
        done = _run("--address", server.target.addresses[0], *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert server.script.prompts == []


def test_contents_are_new_in_each_run() -> None:
    """The same seed gives the same lengths and shared prefixes, but other tokens: what a server has cached of
    one run is of no use to the next.
    """
    scenario = Scenario(seed=1, workload="kimi-conv", length_scale=0.01, concurrency=(1,), requests=6)
    script = Script(first_s=0.0, gap_s=0.0)
    with GrpcServer(script) as server:
        for _ in range(2):
            run = Run()
            with closing(run.stop):
                Measurement(scenario, server.target, Settings(senders=1)).run(run, run.stop, lambda _: None)
    first, second = script.prompts[:6], script.prompts[6:]
    assert [len(prompt) for prompt in first] == [len(prompt) for prompt in second]
    assert all(one[:5] != other[:5] for one, other in zip(first, second, strict=True))


def test_nobody_listens(tmp_path: Path) -> None:
    """One line, soon, with the address."""
    done = _run("--openai", "http://127.0.0.1:9", "--rate", "1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "the connection failed" in done.stderr


def test_a_folder_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    """Two runs are never mixed."""
    with ResultsFolder(tmp_path / "run"):
        pass
    with pytest.raises(InvalidRequest, match="cannot be a new folder"):
        ResultsFolder(tmp_path / "run")


def test_a_real_cluster(tmp_path: Path) -> None:
    """Gateway, dense and attention worker as processes, sessions of two turns: all tokens asked for come, the
    second turn finds the first one's cache, and each role's time is told.
    """
    model = tiny_model(tmp_path / "model", tokenizer=True, max_position_embeddings=512)
    overrides = {"attention.replicas": 1, "attention.block_tokens": 8}
    (tmp_path / "run").mkdir()
    with process_cluster(model, tmp_path / "run", overrides) as cluster:
        done = _run(
            *("--address", _gateway(cluster), "--rate", "10", "--requests", "12", "--turns", "2"),
            *(
                "--prompt",
                "uniform:20:40",
                "--output",
                "6",
                "--out",
                "results",
                "--shape",
                "dense=1xh100,attention=1xh20",
            ),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        cluster.assert_nothing_leaks()
    run = read_run(tmp_path / "results")
    assert {sample.role for sample in run.samples} == {"gateway", "dense", "attention"}
    assert all(sample.blocks > 0 for sample in run.samples if sample.role == "attention")
    page = (tmp_path / "results" / PAGE).read_text()
    assert "1 attention, 1 dense, 1 gateway" in page
    assert run.summaries[0]["usd_per_mtok_idle"] > 0
    assert "J an output token, at 1,100 W of rated power" in done.stdout
    records = run.records
    assert [record.outcome for record in records] == [Outcome.COMPLETED] * 12
    for record in records:
        assert (record.prompt_tokens, record.output_tokens) == (record.asked_prompt_tokens, 6)
        assert sum(record.delta_tokens) == 6
        assert record.cached_tokens >= 16 * record.turn
        assert record.timings is not None
        assert record.timings.attention_seconds > 0
