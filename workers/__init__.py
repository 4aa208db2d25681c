"""The processes that carry tokens: gateways, dense workers, attention workers, and what joins them."""
