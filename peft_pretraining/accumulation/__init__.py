"""Accumulation of gradients layer by layer, over hidden states in host memory."""
