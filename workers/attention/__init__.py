"""The KV cache and the attention computed where it lies."""
