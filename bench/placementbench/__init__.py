"""Compares solvers of expert placement on loads of several families."""
