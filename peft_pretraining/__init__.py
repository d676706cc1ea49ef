"""Pretraining LLaMA on C4: everything about a run that is not Q-GaLore itself, which lives in `qgalore`."""
