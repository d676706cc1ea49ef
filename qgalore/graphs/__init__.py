"""Training steps of a stack of layers, replayed from CUDA graphs."""
