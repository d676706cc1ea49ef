"""The ranks of a run, signals, exit codes and the outcomes of updates."""
