"""The whole pool on a virtual clock: real engines, stores and controller; simulated processes and networks.

Everything that happens is an event of one queue, drawn from one seed: two runs of a seed are the same.
`python -m tests.sim --help` runs thousands of seeds.
"""
