"""What the refreshes of subspaces did, as numbers to log."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from qgalore.subspace.methods import Streaming
from qgalore.update.weight import Weight


def subspace_metrics(weights: Iterable[Weight]) -> dict[str, float | Tensor]:
    """See `qgalore.optimizer.LowRankAdamW`; empty where no weight has a subspace that is refreshed."""
    found = {weight: weight.subspace for weight in weights}
    refreshed = {weight: subspace for weight, subspace in found.items() if isinstance(subspace, Streaming)}
    if not refreshed:
        return {}
    saved = sum(subspace.schedule.saved for subspace in refreshed.values())
    made = sum(subspace.schedule.refreshes for subspace in refreshed.values())
    metrics: dict[str, float | Tensor] = {
        "subspace/refreshes": float(made),
        "subspace/refreshes_saved_fraction": saved / max(1, saved + made),
    }
    for weight, subspace in refreshed.items():
        if subspace.similarity is not None:
            metrics[f"subspace/similarity/{weight.name}"] = subspace.similarity
            subspace.similarity = None
    if len(metrics) > 2:
        failures = [weight.state["failures"] for weight in refreshed if weight.state]
        metrics["subspace/failures"] = torch.stack(failures).sum()
    return metrics
