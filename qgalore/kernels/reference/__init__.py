"""The arithmetic of Q-GaLore in plain PyTorch: what every kernel must equal, and the path where Triton is absent.

A file is a family of operations; those in its `__all__` have the same names and arguments in `qgalore.kernels.triton`,
and are described in `qgalore.kernels.api`.
"""
