"""One update of a weight: its gradient, its moments, its direction, its new value."""
