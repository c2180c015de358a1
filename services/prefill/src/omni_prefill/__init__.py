"""Prompts to KV blocks and first tokens."""

__version__ = "0.1.0"
