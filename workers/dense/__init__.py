"""Continuous batching, shards and sampling on a dense worker."""
