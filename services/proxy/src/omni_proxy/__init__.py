"""REST in front, scheduling, the life of a request."""

__version__ = "0.1.0"
