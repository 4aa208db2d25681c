"""Generated from proto/anabranch/v1; regenerate with `make proto`."""
