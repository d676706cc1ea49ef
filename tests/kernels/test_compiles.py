"""Every Triton kernel compiles, and fits, for each kind of card: ahead of time, without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CARDS = {  # compute capability: bytes of shared memory that a program can have there
    "RTX 30": (86, 99 << 10),
    "H100": (90, 227 << 10),
    "RTX 50": (120, 99 << 10),
}
MORE_CARDS = {"A100": (80, 163 << 10), "RTX 40": (89, 99 << 10)}
"""Whose kernels differ from those of a card above in few instructions."""


def compiled(root: Path, *arguments: str) -> Any:
    """What `compile_kernels.py` prints."""
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), *arguments]
    done = subprocess.run(command, cwd=root, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels_of(root: Path, without: tuple[str, ...] = ()) -> set[str]:
    """The names of all kernels, but for those of some files."""
    return {
        name for folder in ("qgalore/kernels/triton", "peft_pretraining/models/ops")
        for file in (root / folder).glob("*.py") if file.stem not in without
        for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    }  # fmt: skip


@pytest.mark.slow
def test_every_kernel_compiles_and_fits_a_card_without_bfloat16(root: Path) -> None:
    """A T4, in float16; scales of groups are bfloat16 there, too, and are converted in registers."""
    taken: dict[str, int] = compiled(root, "75", "float16")["shared"]
    assert {*taken} == kernels_of(root, without=("newton_schulz", "newton_schulz_fp8", "int8_matmul", "fp8_matmul"))
    assert {name: size for name, size in taken.items() if size > 64 << 10} == {}


@pytest.mark.parametrize("card", [*CARDS, *(pytest.param(card, marks=pytest.mark.slow) for card in MORE_CARDS)])
def test_every_kernel_compiles_and_fits_a_card(card: str, root: Path) -> None:
    capability, limit = (CARDS | MORE_CARDS)[card]
    found = compiled(root, str(capability))
    taken: dict[str, int] = found["shared"]
    assert set(taken) == kernels_of(root, without=("newton_schulz_fp8", "fp8_matmul") if capability < 89 else ())
    assert {name: size for name, size in taken.items() if size > limit} == {}
    # A norm has the same bits whether its gradient is looked at alone, at the end of its hook, or with its layer's.
    assert {name: len(layouts) for name, layouts in found["sums"].items()} == dict.fromkeys(found["sums"], 1)
    assert found["int8"] == {"256": ["wgmma" if card == "H100" else "mma"], "16": ["mma"]}, "products are not of INT8"
    # The weights and the bases; where a side is ragged, that matrix alone.
    assert found["dequantized"] == {"512 x 1376": 2, "1024 x 2736": 2, "1024 x 2730": 2}
    assert found["indices"] == 2, "one for the partial sums and one for the norms, whatever their indices"
    # 8 bits and 4: as long as rows of 5461 bytes were stored without padding, the update moved 256 single ones.
    assert found["bytes"] == {
        name: [0, 0] for name in ("_dequantize_kernel", "_update_kernel", "_low_rank_update_kernel")
    }
    assert set(found["fp8"].values()) <= {0}, "padding that is stored is to be moved with what is before it"
    assert len(found["fp8"]) == (5 if capability >= 89 else 0)
    products = [f"_{kind}{name}_kernel" for kind in ("", "fp8_") for name in ("apply", "gram", "square")]
    # A sum that is moved out of its registers takes longer than the loads that descriptors save.
    assert found["spills"] == (dict.fromkeys(products, 0) if card == "H100" else {})


@pytest.mark.parametrize(("hip", "portable"), [("None", False), ("'6.4'", True)])
def test_no_instructions_of_nvidia_on_amd(hip: str, portable: bool, root: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    code = f"import torch; torch.version.hip = {hip}; from qgalore.kernels.triton.tiles import PORTABLE"
    code += "; print(PORTABLE.value)"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(portable), done.stderr
    for file in (root / "qgalore/kernels/triton").glob("*.py"):  # each asks before it uses one
        for function in re.findall(r"^def .*?(?=^\S|\Z)", file.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            assert "inline_asm" not in function or "if PORTABLE:" in function, (file.name, function)
