"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ON_A_GPU = torch.cuda.is_available()
if not ON_A_GPU:
    # Triton asks for it whenever a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors are fastest on one thread, and one thread keeps sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture
def restored() -> Iterator[None]:
    """Put back what a program that the test calls in this process has set for it, such as deterministic kernels."""
    from tests.golden.record import restored_process

    with restored_process():
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root directory."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real C4 documents, a token set and the T5 tokenizer, which lie beside a developer's checkout only."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is absent: it holds real C4 samples that the project may not redistribute")
    return path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """One body of a test for the CPU and for a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(request.param)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if ON_A_GPU else "cpu"])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels can run: a GPU, or else the CPU, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run here")
    return torch.device(request.param)
