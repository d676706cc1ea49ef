"""Linear layers over quantized weights, and what autograd sees of them."""
