"""Contracts of the Omni services and their generated stubs."""

__version__ = "0.1.0"
