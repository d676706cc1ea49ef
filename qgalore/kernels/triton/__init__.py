"""The operations of `qgalore.kernels.reference` as Triton kernels; imported only where Triton is."""
