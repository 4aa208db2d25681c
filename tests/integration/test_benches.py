"""Benches from end to end, small: real processes, lanes, engines and caches; what they say verifies."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anabranch.cli.bench import context, directory, directory_copy, lane, product, results_file
from anabranch.cli.bench.contender import Cell
from anabranch.cli.bench.namespaces import LOOPBACK
from anabranch.cli.bench.records import Results, differences, records
from anabranch.cli.bench.serve import ServeBench, measure
from anabranch.cli.bench.timeline import draw
from cluster.errors import ConfigError, InvalidRequest
from tests.models import tiny_model
from tests.redis_server import BINARY, MISSING
from workers.kernels.select import has_compiled_code

SERVE_KEYS = {
    "batch", "prompt", "mode", "decode_tok_s", "prefill_tok_s",
    "vs_vllm_cpu", "prefill_vs_vllm_cpu", "vs_transformers", "prefill_vs_transformers",
}  # fmt: skip

PEER = f"""#!{sys.executable}
import json, sys
print(json.dumps({{"ready": {{"version": "1"}}}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"prefill_s": 1.0, "step_s": [0.5]}}), flush=True)
"""


def verified(results: Results) -> dict[str, float]:
    """Values by name after a way through JSON; every one follows from its samples."""
    found = json.loads(json.dumps(results_file.stamp(results)))
    assert differences(found) == []
    return {name: record["value"] for name, record in records(found)}


def test_lanes_are_measured_beside_bare_loops() -> None:
    """Each transport and size has samples, TLS beside plain with `openssl`, and lanes have floors."""
    found = {"lane": lane.measure(repeats=1, way=LOOPBACK, trips=(2, 1))}
    values = verified(found)
    for key in ("local_vs_bare", "local_vs_grpc", "tcp_vs_bare", "tcp_throughput_vs_bare"):
        assert values[f"lane.{key}"] > 0
    for size in ("16kib", "4mib"):
        trips = found["lane"][f"round_trip_{size}"]
        assert {"bare_unix", "bare_tcp", "local", "tcp", "grpc"} <= set(trips)
        assert f"lane.round_trip_{size}.tcp.floor" in values
    settings = found["lane"]["tcp_vs_bare"]["settings"]
    assert settings["network"] == "loopback"
    assert ("lane.tls_vs_plain" in values) == settings["tls"].startswith("gRPC")


def test_the_directory_is_measured() -> None:
    """Rates, memory and times of a small cluster; an odd number of blocks is no special case."""
    values = verified({"directory": directory.measure(workers=3, blocks=7)})
    assert len(values) == 7
    assert all(value > 0 for value in values.values())


@pytest.mark.redis
@pytest.mark.skipif(BINARY is None, reason=MISSING)
def test_the_directorys_copy_is_measured_in_a_redis_of_its_own() -> None:
    """Blocks are written, changed, restored and found; memory of the server grows by what they take."""
    assert BINARY is not None
    values = verified({"directory": directory_copy.measure(BINARY, workers=3, blocks=1001)})
    assert len(values) == 5
    assert all(value > 0 for value in values.values())
    assert 32 < values["directory.copy_memory_per_entry"] < 2000


def test_a_redis_that_does_not_start_is_told() -> None:
    """A program that ends at once is no server."""
    with pytest.raises(ConfigError, match="ended"):
        directory_copy.measure("true", workers=1, blocks=2)


@pytest.mark.skipif(not has_compiled_code(), reason="the C++ extension is not built")
def test_products_are_measured_beside_memory_and_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and threads have their ratio to oneDNN; where reading is what counts, one to the memory."""
    monkeypatch.setattr(product, "_LAYERS", 1)
    values = verified(product.measure(repeats=1, tell=lambda _: None))
    for threads in (1, 2):
        assert values[f"product.rows1/threads{threads}.read_ratio"] > 0
        assert values[f"product.rows1024/threads{threads}.vs_onednn"] > 0


def test_attention_by_context_tells_line_memory_and_workers() -> None:
    """Every length has samples and memory counted in pages; the arena holds at least what was written."""
    found = context.measure(context.ContextBench((1024, 2048, 4096), 2), lambda _: None)
    values = verified(found)
    assert {"context.line.slope", "context.line.intercept", "context.line.r2"} <= set(values)
    assert values["context.workers_speedup.predicted_2"] > 0
    for tokens in (1024, 2048, 4096):
        assert values[f"context.seconds.{tokens}"] > 0
        assert values[f"context.memory_vs_formula_max.{tokens}"] >= 1


def test_pages_of_a_mapping_count_when_they_are_written() -> None:
    """Memory is seen where it lies: nothing before the first write, what was written after it."""
    from workers.kernels.memory import reserve

    size = 64 * 2**20
    memory = reserve(size, torch.device("cpu"))
    before = context.resident_bytes(memory.data_ptr())
    memory[: size // 2] = 1
    written = context.resident_bytes(memory.data_ptr()) - before
    assert size // 2 <= written < size
    with pytest.raises(InvalidRequest, match="no mapping"):
        context.resident_bytes(0)


def test_whole_batches_in_both_modes_beside_peers(tmp_path: Path) -> None:
    """Ours, monolithic and disaggregated, in turn with peers: every row has all keys, the peers' settings
    with the sweep they come from, and both sample lists.
    """
    peer = tmp_path / "python"
    peer.write_text(PEER)
    peer.chmod(peer.stat().st_mode | stat.S_IXUSR)
    folder = tiny_model(tmp_path / "model", vocab_size=40_064)
    cells, said = (Cell(1, 128),), list[str]()
    bench = ServeBench(str(folder), "float32", 2, 256, 1, cells, str(peer), (Cell(1, 8),))
    found = measure(bench, said.append)
    verified(found)
    assert [row["mode"] for row in found["serve"]] == ["monolithic", "disaggregated"]
    for row in found["serve"]:
        assert set(row) == SERVE_KEYS
        told = row["vs_vllm_cpu"]
        assert len(told["a"]["samples"]) == len(told["b"]["samples"]) == 1
        assert len(told["settings"]["vllm_cpu"]["sweep"]) > 2
        assert row["decode_tok_s"]["floor"]["value"] > 0
    assert any("round 1 of 1" in line for line in said)


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    """Where matplotlib is not there, the error names the command; where it is, a picture is written."""
    span = {"side": "lane", "micro_batch": 0, "layer": 0, "begin_s": 0.0, "end_s": 0.001}
    file = tmp_path / "step.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install matplotlib"):
            draw([span], file, "a step")
    else:
        draw([span], file, "a step")
        assert file.read_bytes().startswith(b"\x89PNG")


def test_a_bench_says_what_it_did_not_find(tmp_path: Path) -> None:
    """`verify` names the record that was changed, and ends with an error."""
    file = tmp_path / "results.json"
    results_file.write(
        file,
        results_file.stamp(
            {
                "context": context.summary({1024: [1.0], 2048: [2.0]}, {1024: 1024, 2048: 4096}, {}, 1.0)[
                    "context"
                ]
            }
        ),
    )
    command = [sys.executable, "-m", "anabranch.cli", "bench", "verify", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    changed = json.loads(file.read_text())
    changed["context"]["line"]["r2"]["value"] = 0.5
    file.write_text(json.dumps(changed))
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode != 0
    assert "context.line.r2" in ran.stderr
