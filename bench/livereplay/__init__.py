"""A trace through running engines, one policy after another. Run `bench/replay.py`."""
