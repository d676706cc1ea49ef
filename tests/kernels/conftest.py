"""One body of a kernel test for the CPU and for a GPU."""

import pytest
import torch

NO_GPU = "needs a CUDA GPU"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return torch.device(request.param)
