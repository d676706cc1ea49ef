"""Operators of the models, each with its kernel beside it."""
