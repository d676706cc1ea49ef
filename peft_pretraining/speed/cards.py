"""Cards by name: what their vendor publishes of memory, arithmetic and bandwidth, and what of that a program reaches.

Figures are of dense products in bfloat16 with sums in float32, without sparsity. NVIDIA's white papers give them for
the largest GeForce cards; they are 512 operations per multiprocessor and clock on all cards of these three generations
(RTX 30, 40 and 50), so that the number of multiprocessors and the boost clock of a data sheet give the rest.

The link to the host is PCI Express of the generation and width that the same pages give: 16 GT/s a lane in generation 4
and 32 in generation 5, of which 128 of 130 bits are data (PCI-SIG, base specifications 4.0 and 5.0): 31.5 and 63.0 GB/s
in each direction over 16 lanes. A machine may give a card fewer lanes.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from peft_pretraining.errors import UserError
from peft_pretraining.speed.passes import TBPS, TFLOPS, Ceilings
from peft_pretraining.speed.text_table import text_table

_ADA = "NVIDIA Ada GPU Architecture white paper; the card's page on nvidia.com"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture white paper; the card's page on nvidia.com"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture white paper; the card's page on nvidia.com"
_GEFORCE_OPERATIONS = 512
"""In bfloat16 with sums in float32, a multiprocessor and clock: 128 multiprocessors at 2.52 GHz have 165.2 TFLOP/s."""


class Card(NamedTuple):
    """A card as its vendor describes it."""

    name: str
    gigabytes: int
    """Of memory, by the name: a card of 24 GB has 24 GiB, and what is above 24 GB is left to context and display."""
    tflops: float
    """Dense bfloat16 products with float32 sums, 10^12 operations a second."""
    bandwidth: float
    """Of memory, 10^9 bytes a second."""
    source: str
    """Where the figures stand."""
    device: str = ""
    """What CUDA calls it, where runs on it are in `benchmarks/results/`: it was measured."""
    fp8: bool = True
    """Whether it has products in FP8: compute capability 8.9 and up."""
    link: float = 31.5
    """To the host, 10^9 bytes a second in each direction; by default PCI Express 4.0 over 16 lanes."""

    @property
    def ceilings(self) -> Ceilings:
        """What a program reaches: the shares of the published rates that an H100 has in large products and copies."""
        h100 = CARDS["h100"]
        rate = self.tflops * 1e12 * TFLOPS / h100.tflops
        return Ceilings(rate, self.bandwidth * 1e9 * TBPS * 1e3 / h100.bandwidth, SECONDS_PER_KERNEL)

    @property
    def link_bytes_per_second(self) -> float:
        """What copies from or to page-locked memory reach of the link; an estimate, not measured."""
        return self.link * 1e9 * SHARE_OF_LINK

    @property
    def bytes(self) -> int:
        """Its memory as a budget."""
        return self.gigabytes * 10**9


def _geforce(
    name: str, gigabytes: int, processors: int, gigahertz: float, bandwidth: float, source: str, link: float
) -> Card:
    tflops = round(_GEFORCE_OPERATIONS * processors * gigahertz / 1e3, 1)
    return Card(f"GeForce RTX {name}", gigabytes, tflops, bandwidth, source, fp8=source != _AMPERE, link=link)


NOT_MEASURED = "No consumer card was measured, only H100s and H200s, some runs with their memory capped."
SECONDS_PER_KERNEL = 2e-6
"""Between two kernels of a CUDA graph: what is left beside a pass's own time where it is very short; an estimate."""
SHARE_OF_LINK = 0.8
"""Of a link's published rate that large copies reach: a default, until rows say more."""
_PCIE_4, _PCIE_4_X8, _PCIE_5, _PCIE_5_X8 = 31.5, 15.75, 63.0, 31.5
CARDS = {
    "3060": _geforce("3060 12 GB", 12, 28, 1.777, 360, _AMPERE, _PCIE_4),
    "3090": _geforce("3090", 24, 82, 1.695, 936, _AMPERE, _PCIE_4),
    "4060": _geforce("4060", 8, 24, 2.460, 272, _ADA, _PCIE_4_X8),
    "4060ti": _geforce("4060 Ti 16 GB", 16, 34, 2.535, 288, _ADA, _PCIE_4_X8),
    "4060ti8gb": _geforce("4060 Ti 8 GB", 8, 34, 2.535, 288, _ADA, _PCIE_4_X8),
    "4070": _geforce("4070", 12, 46, 2.475, 504, _ADA, _PCIE_4),
    "4080": _geforce("4080", 16, 76, 2.505, 717, _ADA, _PCIE_4),
    "4090": _geforce("4090", 24, 128, 2.520, 1008, _ADA, _PCIE_4),
    "5060ti": _geforce("5060 Ti 16 GB", 16, 36, 2.572, 448, _BLACKWELL, _PCIE_5_X8),
    "5070ti": _geforce("5070 Ti", 16, 70, 2.452, 896, _BLACKWELL, _PCIE_5),
    "5080": _geforce("5080", 16, 84, 2.617, 960, _BLACKWELL, _PCIE_5),
    "5090": _geforce("5090", 32, 170, 2.407, 1792, _BLACKWELL, _PCIE_5),
    "a10": Card("A10", 24, 125, 600, "NVIDIA A10 data sheet", fp8=False),
    "l4": Card("L4", 24, 121, 300, "NVIDIA L4 data sheet: 242 with sparsity"),
    "l40s": Card("L40S", 48, 362, 864, "NVIDIA L40S data sheet"),
    "a100": Card("A100 80 GB SXM", 80, 312, 2039, "NVIDIA A100 data sheet", fp8=False),
    "h100": Card(
        "H100 SXM", 80, 989, 3350, "NVIDIA H100 data sheet: 1,979 with sparsity", "NVIDIA H100 80GB HBM3", link=_PCIE_5
    ),
    "h200": Card(
        "H200 SXM", 141, 989, 4800, "NVIDIA H200 data sheet: 1,979 with sparsity", "NVIDIA H200", link=_PCIE_5
    ),
}  # fmt: skip
"""By the name of `--gpu`."""


def table_of_cards() -> str:
    """All cards with their figures and sources."""
    rows = [["--gpu", "card", "GB", "bfloat16 TFLOP/s", "GB/s", "link GB/s", "source", "measured"]]
    for key, card in CARDS.items():
        figures = [str(card.gigabytes), f"{card.tflops:g}", f"{card.bandwidth:,g}", f"{card.link:g}"]
        rows.append([key, card.name, *figures, card.source, "yes" if card.device else "no"])
    return (
        f"{text_table(rows)}\n\nDense products with sums in float32. The link is PCI Express to the host, each way. "
        f"{NOT_MEASURED}"
    )


def find_card(text: str) -> Card:
    """The card of a name such as 4090, RTX-4060-Ti or H100; raises UserError for others."""
    key = text.lower()
    for noise in ("nvidia", "geforce", "rtx", " ", "-", "_"):
        key = key.replace(noise, "")
    if key in CARDS:
        return CARDS[key]
    nearest = difflib.get_close_matches(key, CARDS, n=1)
    advice = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"--gpu {text} is not in the table of cards: {advice}there are {', '.join(CARDS)}; for any other give --memory "
        "alone, or a card of about its speed beside it"
    )


def card_of_size(nbytes: int) -> Card:
    """The card whose speed stands for a memory of this size: the largest usual one that is not larger."""
    usual = [CARDS[name] for name in ("4060ti8gb", "4070", "4060ti", "4090", "l40s", "h100")]
    return max([card for card in usual if card.bytes <= nbytes] or usual[:1], key=lambda card: card.bytes)
