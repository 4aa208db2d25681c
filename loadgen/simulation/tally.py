"""What a simulated cluster did, beside what its clients saw. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from loadgen.simulation.steps import StepTimes


@dataclass(slots=True)
class Tally:
    """Sums over steps, of all dense workers together."""

    steps: int = 0
    rows: int = 0
    rows_most: int = 0
    tokens: int = 0
    staggered: int = 0
    step_s: float = 0.0
    dense_s: float = 0.0
    attention_s: list[float] = field(default_factory=list)
    """By attention worker."""
    lane_s: float = 0.0
    used: float = 0.0
    used_most: float = 0.0
    weighted_rows: float = 0.0

    def step(
        self, begins_s: float, ends_s: float, rows: int, tokens: int, times: StepTimes, used_share: float
    ) -> None:
        """One step more."""
        wall_s = ends_s - begins_s
        self.steps += 1
        self.rows += rows
        self.rows_most = max(self.rows_most, rows)
        self.tokens += tokens
        self.staggered += times.micro_batches > 1
        self.step_s += wall_s
        self.dense_s += times.dense_s
        self.lane_s += times.lane_s
        self.attention_s = [
            a + b
            for a, b in zip(
                self.attention_s or [0.0] * len(times.attention_s), times.attention_s, strict=True
            )
        ]
        self.used += used_share * wall_s
        self.used_most = max(self.used_most, used_share)
        self.weighted_rows += rows * wall_s

    def figures(self, span_s: float, dense_workers: int, *, is_local: bool) -> dict[str, float]:
        """Shares of `span_s` in which each side worked (attention: its busiest worker), and means over the
        time in steps. `is_local`: dense workers attend themselves.
        """
        stepping_s = self.step_s or 1.0
        busiest_s = max(self.attention_s, default=0.0) / (dense_workers if is_local else 1)
        return {
            "steps": self.steps,
            "mean_step_ms": 1000 * self.step_s / max(1, self.steps),
            "mean_batch_rows": self.weighted_rows / stepping_s,
            "max_batch_rows": self.rows_most,
            "mean_step_tokens": self.tokens / max(1, self.steps),
            "staggered_share": self.staggered / max(1, self.steps),
            "dense_busy_share": self.dense_s / (span_s * dense_workers) if span_s else 0.0,
            "attention_busy_share": busiest_s / span_s if span_s else 0.0,
            "lane_share_of_steps": self.lane_s / stepping_s,
            "mean_pool_used_share": self.used / stepping_s,
            "max_pool_used_share": self.used_most,
        }
