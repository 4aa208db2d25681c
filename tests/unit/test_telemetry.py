"""Structured logs: one line per event, searchable by its fields."""

import json
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster import telemetry
from cluster.telemetry_settings import TelemetryConfig


def test_an_event_is_one_json_line_with_identity_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    """Role and worker stand in every line beside what the caller names."""
    telemetry.configure_logging(TelemetryConfig(), role="dense", worker="dense-0")
    telemetry.logger("test").info("sequence_admitted", request_id="r1", step=7)
    line = json.loads(capsys.readouterr().err)
    assert {"role": "dense", "worker": "dense-0", "request_id": "r1", "step": 7}.items() <= line.items()
    assert (line["level"], line["event"]) == ("info", "sequence_admitted")


def test_an_error_carries_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """The exception is in the same line as the event."""
    telemetry.configure_logging(TelemetryConfig(), role="dense")
    try:
        raise ValueError("the cause")
    except ValueError as error:
        telemetry.logger("test").error("step_failed", error, step=3)
    assert "ValueError: the cause" in json.loads(capsys.readouterr().err)["traceback"]


def test_levels_below_the_configured_one_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """A quiet level writes nothing; text lines hold the same fields."""
    telemetry.configure_logging(TelemetryConfig(log_level="warning", log_format="text"), role="x")
    telemetry.logger("test").info("unseen")
    telemetry.logger("test").warning("seen", step=1)
    written = capsys.readouterr().err
    assert "unseen" not in written
    assert "seen role=x step=1" in written


def test_metrics_are_served() -> None:
    """A registry is readable over HTTP."""
    registry = CollectorRegistry()
    Counter("anabranch_test", "A test.", registry=registry).inc()
    port = telemetry.serve_metrics(registry, "127.0.0.1", 0, str)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"anabranch_test_total 1.0" in answer.read()


def test_names_with_a_colon_reach_prometheus_as_they_are() -> None:
    """Whatever format is preferred: Prometheus asks for OpenMetrics first."""
    registry = CollectorRegistry()
    Counter("vllm:tokens", "A test.", registry=registry).inc()
    port = telemetry.serve_metrics(registry, "127.0.0.1", 0, str)
    accepted = {"accept": "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5"}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=accepted)
    with urllib.request.urlopen(asked, timeout=5) as answer:
        assert answer.headers.get_content_type() == "text/plain"
        assert b"vllm:tokens_total 1.0" in answer.read()
