"""The time of an update, counted before a run begins."""
