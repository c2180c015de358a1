"""Measures the prefix index where it lives: a proxy's replica, Redis, and the kvstore process between them."""
