"""The models that are trained, a folder a family."""
