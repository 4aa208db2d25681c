"""Rules for every test: one compute thread, and in CI no skip but for lack of a GPU, a Redis, or data.

`pytest -m gpu` collects tests/gpu only, because a GPU machine may lack what the other tests import. In every
other run Triton interprets its kernels on the CPU; that is decided when it is imported.
"""

import logging
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    # A shell that runs us in the background has SIGINT ignored, and so would have what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether `-m gpu` passes a test module, or a folder and its conftest, by without importing it."""
    gpu = config.rootpath / "tests" / "gpu"
    elsewhere = gpu not in collection_path.parents and collection_path not in (gpu, *gpu.parents)
    is_code = collection_path.is_dir() or collection_path.suffix == ".py"
    return True if config.option.markexpr == "gpu" and elsewhere and is_code else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true, and in a run of system tests, a skipped test is a failed one; but for those that need a
    GPU, traces or KubeRay's definition, and outside system runs a Redis, which `make test-system` installs.
    """
    report = yield
    is_system = "system" in item.config.option.markexpr.replace("not system", "")
    may_skip = any(
        map(item.get_closest_marker, ("gpu", "traces", "kuberay", *(() if is_system else ("redis",))))
    )
    if report.skipped and (is_system or os.environ.get("CI") == "true") and not may_skip:
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """No test hears, or goes without, events because an earlier one in its process configured the log."""
    yield
    log = logging.getLogger("anabranch")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with grouped heads, for whoever needs no other model."""
    from tests.models import tiny_model  # transformers: not for those who need none

    return tiny_model(tmp_path_factory.mktemp("llama"))
