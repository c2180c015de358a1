"""The connector of engines with an attention pattern (`kv_connector_module_path`)."""

from omni_engine.vllm_nixl import UntilLeaseEnds
from omni_kernels.vllm.omni_attn import connector


class SinkRecentNixlConnector(UntilLeaseEnds, connector.SinkRecentNixlConnector):
    """Pulls kept blocks only, and throws away what came after the lease had ended."""
