"""Faster implementations of the ops, one package per backend; chosen by `omni_kernels.load`, never on import."""
