"""Attention kernels behind one signature; `reference` is the specification."""
