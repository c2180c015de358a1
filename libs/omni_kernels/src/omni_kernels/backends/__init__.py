"""Faster implementations of the ops, one package per device; chosen by `omni_kernels.load`, never on import."""
