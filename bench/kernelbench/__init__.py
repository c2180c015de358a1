"""The parts of bench/kernels.py."""
