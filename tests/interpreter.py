"""Triton's interpreter for tests: Triton reads TRITON_INTERPRET when it is imported, so it needs its own process."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tests.small_run import ROOT


def compare(with_reference: Callable[[torch.device], None], device: torch.device) -> None:
    """Run a comparison of kernels, a function of a test's module, on a GPU, or on the CPU in the interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot run here")
    if device.type == "cuda":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QGALORE_KERNELS", "triton")  # and back again, whatever the comparison sets
            with_reference(device)
        return
    module, name = with_reference.__module__, with_reference.__name__
    program = f"import torch, {module} as m; m.{name}(torch.device('cpu')); print('compared')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "compared" in done.stdout, done.stderr
