"""Worker membership and the prefix index, in Redis."""

__version__ = "0.1.0"
