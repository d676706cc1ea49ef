"""Optimizers by name, and the learning rate."""
