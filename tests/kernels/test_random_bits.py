"""Random bits for rounding: Philox's known answers, and what the bits depend on."""

import pytest
import torch

from qgalore.kernels.reference import random_bits

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
# The known answers of Random123, the authors' library: rounds, counter, key, output (kat_vectors, philox4x32).
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, *ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, *ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    rounds: int, counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...], device: torch.device
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word], dtype=torch.int64, device=device) for word in counter)
    words = random_bits.philox((c0, c1, c2, c3), key[0] | key[1] << 32, rounds)
    assert tuple(int(word) for word in words) == answer


def test_bits_are_the_half_words_of_philox() -> None:
    seed, row_start = 0x299F31D0A4093822, 3
    bits = random_bits.random_bits16(2, 19, seed, row_start, torch.device("cpu"))
    for i in range(2):
        for j in range(19):
            counter = [torch.tensor(word) for word in (j // 8, row_start + i, 0, 0)]
            words = random_bits.philox((counter[0], counter[1], counter[2], counter[3]), seed)
            assert int(bits[i, j]) == (int(words[j % 8 // 2]) >> (16 * (j % 2))) & 0xFFFF


def test_bits_depend_on_seed_and_element_alone(device: torch.device) -> None:
    whole = random_bits.random_bits16(10, 21, 5, 0, device)
    assert torch.equal(whole, random_bits.random_bits16(10, 21, 5, 0, device))
    assert torch.equal(whole[4:], random_bits.random_bits16(6, 21, 5, 4, device))
    assert torch.equal(whole[:, :9], random_bits.random_bits16(10, 9, 5, 0, device))
    for other in (6, 5 + (1 << 32), 5 + (1 << 63)):
        assert not torch.equal(whole, random_bits.random_bits16(10, 21, other, 0, device))


def test_bits_are_uniform(device: torch.device) -> None:
    bits = random_bits.random_bits16(512, 512, 1, 0, device)
    assert bits.dtype == torch.int32 and bits.min() >= 0 and bits.max() < 1 << 16
    count, width = bits.numel(), 1 << 16
    deviation = width / (12 * count) ** 0.5
    assert abs(float(bits.double().mean()) - (width - 1) / 2) < 4 * deviation
    # Every bit is set half of the time, and neighbours in a row and in a column have nothing in common.
    for position in range(16):
        assert abs(float((bits >> position & 1).double().mean()) - 0.5) < 4 * 0.5 / count**0.5
    centred = bits.double() - bits.double().mean()
    variance = centred.square().mean()
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[:, 8:] * centred[:, :-8]):
        assert abs(float(product.mean() / variance)) < 5 / count**0.5
