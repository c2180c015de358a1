"""Operators for Ascend, GPU and CPU: meaning, fake form, validator, samples, tolerances, backends."""

__version__ = "0.1.0"
