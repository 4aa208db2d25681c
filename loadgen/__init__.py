"""The load generator: arrivals, workloads, records, cost."""
