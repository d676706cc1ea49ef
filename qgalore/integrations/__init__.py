"""The library inside training loops of others: Hugging Face's Trainer, accelerate, Lightning, distributed checkpoints.

`docs/guide/trainers.md` has an example of each. Nothing here imports another package than torch before it is used.
"""

from __future__ import annotations

from qgalore.integrations.connection import Connection, connect, without_ddp
from qgalore.integrations.distributed_checkpoint import TrainingState
from qgalore.integrations.trainer import OptimizerFactory, QGaLoreCallback

__all__ = ["Connection", "OptimizerFactory", "QGaLoreCallback", "TrainingState", "connect", "without_ddp"]
