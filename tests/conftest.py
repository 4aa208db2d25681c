"""Rules for every test: one compute thread, and in CI no skip but for a missing GPU."""

import logging
import os
from collections.abc import Generator, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI=true a skipped test is a failed one unless it is marked `gpu`."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """Events never go to the captured output of a test that is over."""
    yield
    logging.getLogger("anabranch").handlers.clear()
