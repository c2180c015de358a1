"""Checks of every torch_npu call against the schemas and meta kernels of real torch-npu wheels, without an NPU.

For tests and the command line only: nothing under `ops`, `backends` or `vllm` imports this package.
"""
