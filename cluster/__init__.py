"""What every role shares: types, configuration, errors, rpc, clock, telemetry. No torch, no ray."""
