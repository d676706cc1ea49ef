"""Triton's kernels; imported only where Triton is."""
