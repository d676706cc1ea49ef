"""Random bits for rounding: Philox's known answers, what they depend on, and the Triton kernel bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qgalore import kernels
from qgalore.kernels import reference

# The known answers of Random123, the authors' library: counter, key, output (kat_vectors, philox4x32 with 10 rounds).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# Rows, columns, seed, first row: both words of the seed, ragged rows, several programs a row.
CASES = [
    (1, 1, 0, 0),
    (3, 7, 1, 0),
    (4, 8, 0x299F31D0A4093822, 5),
    (2, 9, 0xFFFFFFFFFFFFFFFF, 0),
    (3, 1376, 0x299F31D0A4093822, 1000),
    (1, 5461, 1 << 63, 3),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...], device: torch.device
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], dtype=torch.int64, device=device) for word in counter)
    words = reference.philox((c0, c1, c2, c3), key[0] | key[1] << 32)
    assert tuple(int(word) for word in words) == answer


def test_bits_are_the_half_words_of_philox() -> None:
    seed, row_start = 0x299F31D0A4093822, 3
    bits = reference.random_bits16(2, 19, seed, row_start, torch.device("cpu"))
    for i in range(2):
        for j in range(19):
            counter = [torch.tensor(word) for word in (j // 8, row_start + i, 0, 0)]
            words = reference.philox((counter[0], counter[1], counter[2], counter[3]), seed)
            assert int(bits[i, j]) == (int(words[j % 8 // 2]) >> (16 * (j % 2))) & 0xFFFF


def test_bits_depend_on_seed_and_element_alone(device: torch.device) -> None:
    whole = kernels.random_bits16(10, 21, 5, 0, device)
    assert torch.equal(whole, kernels.random_bits16(10, 21, 5, 0, device))
    assert torch.equal(whole[4:], kernels.random_bits16(6, 21, 5, 4, device))
    assert torch.equal(whole[:, :9], kernels.random_bits16(10, 9, 5, 0, device))
    for other in (6, 5 + (1 << 32), 5 + (1 << 63)):
        assert not torch.equal(whole, kernels.random_bits16(10, 21, other, 0, device))


def test_bits_are_uniform(device: torch.device) -> None:
    bits = kernels.random_bits16(512, 512, 1, 0, device)
    assert bits.dtype == torch.int32 and bits.min() >= 0 and bits.max() < 1 << 16
    count, width = bits.numel(), 1 << 16
    deviation = width / (12 * count) ** 0.5
    assert abs(float(bits.double().mean()) - (width - 1) / 2) < 4 * deviation
    # Every bit is set half of the time, and neighbours in a row and in a column have nothing in common.
    for place in range(16):
        assert abs(float((bits >> place & 1).double().mean()) - 0.5) < 4 * 0.5 / count**0.5
    centred = bits.double() - bits.double().mean()
    variance = centred.square().mean()
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[:, 8:] * centred[:, :-8]):
        assert abs(float(product.mean() / variance)) < 5 / count**0.5


def compare_with_reference(device: torch.device) -> None:
    """Run the Triton kernel through the door and compare all bits."""
    os.environ["QGALORE_KERNELS"] = "triton"
    for rows, columns, seed, row_start in CASES:
        expected = reference.random_bits16(rows, columns, seed, row_start, device)
        found = kernels.random_bits16(rows, columns, seed, row_start, device)
        assert found.dtype == expected.dtype and torch.equal(found, expected), (rows, columns, seed, row_start)


def test_triton_kernel_equals_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run here")
    if device.type == "cuda":
        monkeypatch.setenv("QGALORE_KERNELS", "triton")
        compare_with_reference(device)
        return
    # Triton reads TRITON_INTERPRET when it is imported, so the interpreter needs a process of its own.
    root = Path(__file__).resolve().parents[2]
    program = (
        "import torch; from tests.kernels.test_random_bits import compare_with_reference as compare; "
        "compare(torch.device('cpu')); from qgalore.kernels import random_bits; print('compared')"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr
