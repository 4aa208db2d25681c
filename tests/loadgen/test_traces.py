"""Trace files of every format, and the fits beside the traces they were made from."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import InvalidRequest
from loadgen import fits, servegen, traces
from loadgen.workload import Row, described

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
SOURCES = {
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "kimi-conv": "mooncake_conversation_trace.jsonl",
}


def _real(file: str) -> Path:
    folder = os.environ.get("ANABRANCH_TRACES")
    if folder is None:
        pytest.skip("needs the published traces: set ANABRANCH_TRACES to the folder that holds them")
    return Path(folder) / file


def test_azure_rows() -> None:
    """Seven digits of a second, any order of lines; the first request is at 0."""
    lines = [AZURE, "2023-11-16 18:15:47.5000000,20,5", "2023-11-16 18:15:46.2500000,10,4", ""]
    assert traces.parse(lines).rows == (Row(10, 4, 0.0), Row(20, 5, 1.25))


def test_mooncake_rows() -> None:
    """Milliseconds become seconds, hash ids blocks of 512 tokens."""
    line = '{"timestamp": %d, "input_length": 600, "output_length": 7, "hash_ids": [4, 9]}'
    rows = traces.parse([line % 1000, line % 2500]).rows
    assert rows[1] == Row(600, 7, 1.5, blocks=(4, 9), block_tokens=512)


@pytest.mark.parametrize(
    "lines",
    [
        ["num_prefill_tokens,num_decode_tokens,pd_ratio", "30,4,7.5", "1,2,0.5"],
        ["30 4", "1 2"],
        ["30,4", "1,2"],
    ],
)
def test_length_lists(lines: list[str]) -> None:
    """With the names that Vidur writes, or bare; they have no times, and say so when asked."""
    trace = traces.parse(lines)
    assert trace.rows == (Row(30, 4), Row(1, 2))
    with pytest.raises(InvalidRequest, match="no times"):
        trace.times_s()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "empty"),
        (["a,b", "1,2"], "unknown columns 'a,b'"),
        ([AZURE, "2023-11-16 18:15:47,20"], "line 2"),
        ([AZURE, "2023-11-16 18:15:47,20,many"], "line 2"),
        (['{"timestamp": 0}'], "line 1"),
        (["3 4", "3"], "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(lines: list[str], complaint: str) -> None:
    """The message says which line is wrong, or which columns were expected."""
    with pytest.raises(InvalidRequest, match=complaint):
        traces.parse(lines)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Its name is in the message."""
    with pytest.raises(InvalidRequest, match=r"none\.csv cannot be read"):
        traces.read(tmp_path / "none.csv")


def test_a_part_of_a_trace_begins_later() -> None:
    """What came before is left out."""
    trace = traces.parse([AZURE, *(f"2023-11-16 18:15:4{second},1,1" for second in range(5))])
    assert [row.at_s for row in trace.since(3.0).rows] == [3.0, 4.0]


def test_servegen_draws_its_clients(tmp_path: Path) -> None:
    """Requests come within their client's active windows, at its rate, with its lengths; the rate asked for
    is met over all clients; the same seed gives the same requests.
    """
    for number, (first, second) in enumerate((("Gamma,0.25,1", ",0,0"), (",0,0", "Weibull,0.8,1"))):
        lines = [
            f"0,{2.0 if first[0] != ',' else 0},2,{first}",
            f"600,{1.0 if second[0] != ',' else 0},1.5,{second}",
            "1200,0,0,,0,0",
        ]
        (tmp_path / f"chunk-{number}-trace.csv").write_text("\n".join(lines))
        lengths = {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": str({number + 1: 1.0})}
        (tmp_path / f"chunk-{number}-dataset.json").write_text(json.dumps({"0": lengths}))
    clients = servegen.read(tmp_path)
    rows = servegen.draw(clients, 1, 0.0, 1200.0, None)
    assert rows == servegen.draw(clients, 1, 0.0, 1200.0, None)
    early = [row for row in rows if row.at_s is not None and row.at_s < 600]
    assert {(row.tenant, row.output_tokens) for row in early} == {("client-0", 1)}
    assert {row.output_tokens for row in rows[len(early) :]} == {2}
    assert {row.prompt_tokens for row in rows} == {10, 20}
    assert len(early) == pytest.approx(1200, abs=4 * 2 * 1200**0.5)
    assert len(servegen.draw(clients, 1, 0.0, 1200.0, 6.0)) == pytest.approx(7200, rel=0.1)
    with pytest.raises(InvalidRequest, match="no client"):
        servegen.draw(clients, 1, 1300.0, 10.0, None)


@pytest.mark.traces
def test_servegen_real() -> None:
    """Five minutes of the published models: the recorded rate, many clients, and long reasoning outputs."""
    clients = servegen.read(_real("servegen_deepseek-r1.tar.gz"))
    rows = servegen.draw(clients, 0, 7200.0, 300.0, None)
    assert len(rows) / 300 == pytest.approx(32, rel=0.15)
    assert len({row.tenant for row in rows}) > 10
    assert np.mean([row.output_tokens for row in rows]) > 500


@pytest.mark.traces
@pytest.mark.parametrize("name", SOURCES)
def test_a_fit_follows_from_its_trace(name: str) -> None:
    """The command gives what the repository holds, number for number."""
    assert fits.fitted(name, traces.read(_real(SOURCES[name]))) == fits.named(name)


@pytest.mark.traces
@pytest.mark.parametrize("name", SOURCES)
def test_a_fit_is_like_its_trace(name: str) -> None:
    """As many drawn requests as the trace has: mean lengths within 4 %, medians and 99th percentiles within
    10 %, and the share of blocks that an infinite cache would find within 0.03.
    """
    fit, trace = fits.named(name), traces.read(_real(SOURCES[name]))
    rows = fit.rows(1, fit.requests)
    for key in ("prompt_tokens", "output_tokens"):
        ours = np.array([getattr(row, key) for row in rows])
        theirs = np.array([getattr(row, key) for row in trace.rows])
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.04)
        for level in (0.5, 0.99):
            assert np.quantile(ours, level) == pytest.approx(np.quantile(theirs, level), rel=0.1)
    share = described(trace.rows)["ideal_prefix_share"]
    assert described(rows)["ideal_prefix_share"] == pytest.approx(share, abs=0.03)


def test_named_fits_are_labelled_and_need_no_trace() -> None:
    """They are drawn from what the repository holds, say that they are fits, and repeat by seed."""
    for name in SOURCES:
        fit = fits.named(name)
        assert "fitted" in fit.label
        assert fit.rows(3, 100) == fit.rows(3, 100)
        assert fit.rows(3, 100) != fit.rows(4, 100)
    with pytest.raises(InvalidRequest, match="azure-conv, azure-code, kimi-conv"):
        fits.named("azure-chat")


def test_the_coarse_clock_of_a_trace_is_told() -> None:
    """Mooncake's stamps are seconds apart, and are said to be; Azure's are not."""
    line = '{"timestamp": %d, "input_length": 1, "output_length": 1, "hash_ids": [1]}'
    coarse = traces.parse([line % (3000 * (number // 4)) for number in range(12)])
    assert coarse.stamps_line().startswith("the trace has 3 distinct moments for 12 requests")
    assert traces.parse([line % number for number in range(12)]).stamps_line() == ""
