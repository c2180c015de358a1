"""What every Omni service shares: settings, errors, gRPC builders, telemetry, block keys."""

import os

# Before grpc is loaded. Nobody here calls it in a forked child, but it starts its threads there again, with the
# parent's timers: engine processes, which vLLM forks from a service, then die of connections that are not theirs.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

__version__ = "0.1.0"
