"""Train language models: data, models, flags, checkpoints and reports of a run. The method itself is in `qgalore`."""
