"""Build optimizers by name, and the learning rate schedule."""
