"""The autoscaler: a process beside the controller, which changes numbers of pods through Kubernetes.

The only part that speaks to Kubernetes (`controller.autoscaling.workloads`); the decision is
`cluster.policies.autoscaler`.
"""
