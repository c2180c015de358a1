"""Which layers may attend sparsely: search and evaluation of patterns."""
