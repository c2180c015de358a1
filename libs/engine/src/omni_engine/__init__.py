"""The Engine port, its vLLM and simulated implementations, and the hosting of workers."""

__version__ = "0.1.0"
