"""Metrics, progress, speed and memory of a run, for metrics.jsonl, wandb and the terminal."""
