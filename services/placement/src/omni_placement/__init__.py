"""Expert load and layouts."""

__version__ = "0.1.0"
