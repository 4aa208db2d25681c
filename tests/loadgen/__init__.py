"""Is the ruler straight? Schedules, workloads, senders and what is reported of them."""
