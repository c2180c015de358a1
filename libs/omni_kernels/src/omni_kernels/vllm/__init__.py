"""Omni's ops inside vLLM, by vLLM's own hooks. Nothing happens unless the engine's environment asks for it."""
