"""Save a run atomically, and resume it."""
