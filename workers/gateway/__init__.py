"""The public side: gRPC and HTTP APIs, text to tokens and back, routing, failover."""
