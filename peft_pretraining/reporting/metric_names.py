"""The metrics of a run by name: the unit of each, and what it is.

`docs/reference/metrics.md` is made of this table, and a test holds the lines of runs to it.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """A metric of `metrics.jsonl`."""

    unit: str
    meaning: str
    when: str = "each update"
    """Which lines have it."""


_EVALUATION = "each evaluation"
_OF_AVERAGES = "last evaluation of a run with --average_last"
_OF_SUBSPACES = "each update of a run with projections"
_AFTER_REFRESH = "updates after which a subspace has changed"
_ON_GPU = "each update on a GPU"
_TIMED = "each update whose time is known"

METRICS: dict[str, Metric] = {
    "train/loss": Metric("nats a token", "cross-entropy of the batch, over all ranks, before the update"),
    "train/perplexity": Metric("", "exp of train/loss"),
    "train/tokens": Metric("tokens", "what the run has read so far, padding left out, over all ranks"),
    "train/lr": Metric("", "learning rate of the decoder's matrices in this update"),
    "train/full_rank_lr": Metric("", "learning rate of embeddings, head and norms in this update"),
    "train/grad_norm": Metric("", "norm of the whole gradient before clipping, projected where it is low-rank"),
    "train/skipped": Metric("0 or 1", "1 where the update changed nothing, since its loss or gradient was not finite"),
    "train/loss_scale": Metric("", "what the loss was multiplied by", "each update with --dtype float16"),
    "subspace/refreshes": Metric(
        "refreshes", "how often subspaces were found anew so far, over all weights", _OF_SUBSPACES
    ),
    "subspace/refreshes_saved_fraction": Metric(
        "share", "of the refreshes at the first interval, those that the lazy rule has left out", _OF_SUBSPACES
    ),
    "subspace/similarity/<weight>": Metric(
        "0 to 1", "similarity of a weight's new subspace with the one before", _AFTER_REFRESH
    ),
    "subspace/failures": Metric(
        "refreshes", "those that kept the old basis so far, since the new one was not finite", _AFTER_REFRESH
    ),
    "throughput/tokens_per_second": Metric(
        "tokens/s", "positions of the batch over the time, padding included", _TIMED
    ),
    "throughput/mfu": Metric(
        "share", "model FLOPs utilisation after PaLM (arXiv 2204.02311)", "each timed update on a card of known peak"
    ),
    "time/update_seconds": Metric("s", "time of the update, evaluations and checkpoints left out", _TIMED),
    "data/wait_fraction": Metric("share", "of that time, what this rank waited for data", _TIMED),
    "memory/peak_gb": Metric("10^9 bytes", "peak so far: allocated on a GPU, resident in the process on a CPU"),
    "memory/reserved_gb": Metric("10^9 bytes", "peak that PyTorch's allocator has reserved so far", _ON_GPU),
    **{
        f"{kind}/{name}": Metric(unit, f"{meaning}{of}", when)
        for kind, of, when in (
            ("eval", "", _EVALUATION),
            ("eval_averaged", ", of the averaged weights", _OF_AVERAGES),
            ("eval_averaged_quantized", ", of the averaged weights rounded to the run's format", _OF_AVERAGES),
        )
        for name, unit, meaning in (
            ("loss", "nats a token", "mean loss of all held-out tokens"),
            ("perplexity", "", "exp of that loss"),
            ("perplexity_official", "", "by the formula of the official code and the paper: a mean over batches"),
            ("tokens", "tokens", "held-out tokens that were predicted"),
        )
    },
}
"""By name; `<weight>` stands for the name of a weight."""


def described(name: str) -> str | None:
    """The entry of `METRICS` that a metric of a run belongs to; None if there is none."""
    if name.startswith("subspace/similarity/"):
        return "subspace/similarity/<weight>"
    return name if name in METRICS else None
