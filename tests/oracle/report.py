"""RESULTS.md: what the last run of the full oracle found, where and with which versions."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.oracle.matrix import LOGPROB_TOLERANCE, NEAR_TIES_MOST, Tally

RESULTS = Path(__file__).with_name("RESULTS.md")
_TREE = RESULTS.parents[2]
_RESULTS_IN_TREE = RESULTS.relative_to(_TREE)

_HEADER = """\
# Token equality: the last full run

Written by `make oracle-full`. Everything of ours is float32. A free-running comparison stops at the first
near-tie of the reference (the best two within 1e-3); a teacher-forced one leaves out near-ties and goes on. A
part fails on any other token, on a log-probability further than {tolerance:g} from the reference's, or if
more than {share:.0%} of its positions are near-ties.

* **References.** Greedy: transformers. Tokens are compared with its float32 (plainest attention),
  log-probabilities with the same model on the same tokens in float64: float32 would be a blurred yardstick,
  and how far it is itself from float64 at most stands beside ours. Sampled: the same request alone,
  monolithic.
* **Free-running.** Log-probabilities are those of the chosen tokens, up to the first near-tie.
* **Teacher-forced.** Prompt and reference tokens go through the cluster as one prompt, in chunks; the final
  hidden state of every position is kept, and compared are its best token, the log-probability of the
  reference's best token and those of 64 token ids drawn from the vocabulary.
* **Architectures.** Not the whole product: a covering in which every pair of values meets, of {cases} models
  (architecture and rope scaling), 5 shardings, steps of 1, 7, 64, 256 and blocks of 1, 7, 16, 32 tokens.
* **Reduced.** Batches are of 1, 3, 8 and 16; sampling runs over 3 shardings and one small arena; transports
  over 2 and 5 workers, with the tiny model. The real model's lanes are all `local`.
"""


@dataclass
class Part:
    """One line of the table."""

    title: str
    tally: Tally = field(default_factory=Tally)


def write(parts: Sequence[Part], commit: str, seconds: float, models: int) -> bool:
    """Write the results of a run of `commit`; whether all parts passed."""
    verdicts = {part.title: part.tally.verdict() for part in parts}
    lines = [
        _HEADER.format(tolerance=LOGPROB_TOLERANCE, share=NEAR_TIES_MOST, cases=models),
        *_circumstances(commit, seconds),
        "",
        "| part | cases | positions | compared | near-ties | largest log-probability difference "
        "| of the float32 reference | result |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
        *(_row(part, not verdicts[part.title]) for part in parts),
    ]
    problems = [f"* {title}: {problem}" for title, found in verdicts.items() for problem in found]
    if problems:
        lines += ["", "## What failed", "", *problems]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return not problems


def _row(part: Part, passed: bool) -> str:
    tally = part.tally
    cells = (
        part.title,
        f"{tally.cases:,}",
        f"{tally.positions:,}",
        f"{tally.compared:,}",
        f"{tally.near_ties:,}",
        _difference(tally.largest_difference),
        _difference(tally.reference_difference),
        "passed" if passed else "**failed**",
    )
    return f"| {' | '.join(cells)} |"


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _circumstances(commit: str, seconds: float) -> list[str]:
    """Commit, date, machine and versions, one to a line."""
    return [
        f"* commit: {commit}",
        f"* date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {seconds / 60:.0f} minutes",
        f"* machine: {_processor()}, {os.cpu_count()} cores",
        f"* Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}",
    ]


def commit_now() -> str:
    """The commit the tree stands at, and whether any file but the results differs from it; ask before the
    run.
    """
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{_RESULTS_IN_TREE}")
    return f"{commit} with changes not committed" if changed else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_TREE, capture_output=True, text=True)
    return done.stdout.strip() or ("unknown" if done.returncode else "")


def _processor() -> str:
    """The processor's name, as Linux knows it; its architecture elsewhere."""
    information = Path("/proc/cpuinfo")
    names = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.machine()
    )
