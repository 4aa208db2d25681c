"""The per-layer exchange between a dense and an attention worker, one interface over several transports."""
