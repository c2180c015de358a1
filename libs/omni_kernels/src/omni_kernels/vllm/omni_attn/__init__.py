"""Attention over the first and the most recent positions of a sequence, inside vLLM."""
