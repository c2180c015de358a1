"""What every Omni service shares: settings, errors, gRPC builders, telemetry, block keys."""

__version__ = "0.1.0"
