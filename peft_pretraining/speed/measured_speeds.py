"""Measured tokens a second of Q-GaLore: the newest row of each setting in `benchmarks/results/compare.csv`.

A test holds the table to those rows; it stands here for an installed package, which has no benchmarks. All are of the
paper's algorithm with the streaming subspace and a refresh every 200 updates: INT8 weights, INT4 bases, 8-bit states,
updates inside the backward pass, sequences of 256 random tokens, ten updates in a row.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "benchmarks/results/compare.csv"


class MeasuredSpeed(NamedTuple):
    """A row."""

    card: str
    """A name of `cards.CARDS`."""
    model: str
    batch_size: int
    """Sequences of a micro-batch."""
    gradient_accumulation: int
    rank: int
    checkpoint_every: int
    """One in so many layers was computed again; 0: none."""
    int8_activations: bool
    tokens_per_second: int
    """Of updates in a row."""
    peak_gb: float
    """Of the process, 10^9 bytes."""
    commit: str


MEASURED_SPEEDS = (
    MeasuredSpeed("h100", "60m", 256, 1, 128, 0, False, 1421841, 7.235, "caf4340"),
    MeasuredSpeed("h100", "60m", 256, 1, 128, 0, True, 1384029, 5.814, "caf4340"),
    MeasuredSpeed("h100", "60m", 256, 1, 128, 12, True, 1372834, 5.762, "caf4340"),
    MeasuredSpeed("h100", "60m", 256, 1, 128, 1, False, 1200219, 2.117, "caf4340"),
    MeasuredSpeed("h100", "130m", 128, 1, 256, 0, False, 634084, 7.94, "caf4340"),
    MeasuredSpeed("h100", "130m", 128, 1, 256, 0, True, 629901, 6.354, "caf4340"),
    MeasuredSpeed("h100", "130m", 128, 1, 256, 12, True, 618282, 6.32, "caf4340"),
    MeasuredSpeed("h100", "130m", 128, 1, 256, 1, False, 518125, 2.032, "caf4340"),
    MeasuredSpeed("h100", "350m", 64, 1, 256, 0, False, 228533, 10.539, "caf4340"),
    MeasuredSpeed("h100", "350m", 64, 1, 256, 0, True, 226456, 8.421, "caf4340"),
    MeasuredSpeed("h100", "350m", 64, 1, 256, 12, True, 222128, 8.034, "caf4340"),
    MeasuredSpeed("h100", "350m", 64, 1, 256, 1, False, 181289, 2.314, "caf4340"),
    MeasuredSpeed("h100", "1b", 16, 1, 512, 0, False, 64911, 7.553, "caf4340"),
    MeasuredSpeed("h100", "1b", 16, 1, 512, 0, True, 64794, 6.494, "caf4340"),
    MeasuredSpeed("h100", "1b", 16, 1, 512, 12, True, 62997, 6.234, "caf4340"),
    MeasuredSpeed("h100", "1b", 16, 1, 512, 1, False, 51787, 3.375, "caf4340"),
    MeasuredSpeed("h100", "7b", 16, 32, 1024, 1, False, 11422, 15.189, "0ffbf27"),
    MeasuredSpeed("h100", "7b", 16, 1, 1024, 1, False, 11064, 13.252, "820d367"),
    MeasuredSpeed("h200", "60m", 256, 1, 128, 0, False, 1580983, 7.231, "164f053"),
    MeasuredSpeed("h200", "60m", 256, 1, 128, 0, True, 1445273, 5.878, "ef42296"),
    MeasuredSpeed("h200", "60m", 256, 1, 128, 12, True, 1417367, 5.83, "ef42296"),
    MeasuredSpeed("h200", "60m", 256, 1, 128, 2, False, 1299684, 4.969, "7e84f43"),
    MeasuredSpeed("h200", "60m", 256, 1, 128, 1, False, 1231663, 2.18, "ef42296"),
    MeasuredSpeed("h200", "130m", 128, 1, 256, 0, False, 649469, 7.99, "ef42296"),
    MeasuredSpeed("h200", "130m", 128, 1, 256, 0, True, 655512, 6.405, "ef42296"),
    MeasuredSpeed("h200", "130m", 128, 1, 256, 12, True, 642063, 6.371, "ef42296"),
    MeasuredSpeed("h200", "130m", 128, 1, 256, 2, False, 574691, 5.197, "7e84f43"),
    MeasuredSpeed("h200", "130m", 128, 1, 256, 1, False, 541917, 2.083, "ef42296"),
    MeasuredSpeed("h200", "350m", 64, 1, 256, 0, False, 232390, 10.573, "ef42296"),
    MeasuredSpeed("h200", "350m", 64, 1, 256, 0, True, 227494, 8.454, "ef42296"),
    MeasuredSpeed("h200", "350m", 64, 1, 256, 12, True, 223930, 8.067, "ef42296"),
    MeasuredSpeed("h200", "350m", 64, 1, 256, 2, False, 200455, 6.498, "7e84f43"),
    MeasuredSpeed("h200", "350m", 64, 1, 256, 1, False, 187000, 2.347, "ef42296"),
    MeasuredSpeed("h200", "1b", 16, 1, 512, 0, False, 63657, 7.57, "ef42296"),
    MeasuredSpeed("h200", "1b", 16, 1, 512, 0, True, 63895, 6.511, "ef42296"),
    MeasuredSpeed("h200", "1b", 16, 1, 512, 12, True, 62536, 6.251, "ef42296"),
    MeasuredSpeed("h200", "1b", 16, 1, 512, 2, False, 52122, 5.48, "7e84f43"),
    MeasuredSpeed("h200", "1b", 16, 1, 512, 1, False, 51299, 3.392, "ef42296"),
    MeasuredSpeed("h200", "7b", 16, 1, 1024, 1, False, 10874, 13.277, "ef42296"),
    MeasuredSpeed("h200", "13b", 2, 256, 1024, 1, False, 3305, 23.729, "3bcf4f9"),
)


def measured(card: str, model: str, rank: int, budget: int) -> MeasuredSpeed | None:
    """The fastest row of a model and rank on a card whose peak is below a budget in bytes."""
    found = [
        each
        for each in MEASURED_SPEEDS
        if (each.card, each.model, each.rank) == (card, model, rank) and each.peak_gb * 1e9 <= budget
    ]
    return max(found, key=lambda each: each.tokens_per_second, default=None)
