"""Weights in fewer bits: checkpoints written in the compressed-tensors format, and experts that run on them in vLLM."""
