"""The table of bytes of one update, of the same figures as its picture."""

from __future__ import annotations

from docs.make.markdown import table
from docs.make.update_flow import figures

_LINES = {
    "codes": ("the weight W: INT8 codes, with a scale and a zero point in bfloat16 a group of 256", "stays"),
    "basis": ("the basis B: INT4 codes, two in a byte, with scales and zero points", "stays"),
    "sum": ("the sum of R over micro-batches in INT8; none with one micro-batch", "stays"),
    "moments": ("Adam's two moments of R: a byte a value, and a float32 a block of 256", "stays"),
    "weight": ("W in bfloat16, for a product", "passes"),
    "input": ("the input X, 16 x 256 tokens", "passes"),
    "projected input": ("X Bᵀ", "passes"),
    "gradient of the output": ("the gradient of the output, D", "passes"),
    "low-rank gradient": ("R = Dᵀ X Bᵀ in bfloat16", "passes"),
    "full gradient": ("Dᵀ X, the full gradient", "never there"),
    "full moments": ("two float32 moments of the full gradient", "never there"),
}


def bytes_of_one_update() -> str:
    """What there is of one matrix, in 10^6 bytes."""
    sizes = figures()
    return table(
        ["of one 4096 x 4096 matrix", "MB", ""],
        [[text, f"{sizes[name]:.2f}", kind] for name, (text, kind) in _LINES.items()],
    )
