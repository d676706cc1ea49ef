"""Saving a run, whole or not at all, and taking it up again."""
