"""The omni command: run a stack on one machine and look at it."""

__version__ = "0.1.0"
