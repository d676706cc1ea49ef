"""The optimizers, AdamW and Adafactor on projected gradients; the cycle of an update; saved states; `summary`."""

from qgalore.optimizer.adamw import GaLoreAdamW, GaLoreAdamW8bit, LowRankAdamW, QGaLoreAdamW8bit

__all__ = ["GaLoreAdamW", "GaLoreAdamW8bit", "LowRankAdamW", "QGaLoreAdamW8bit"]
