"""The benchmark of products in INT8."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_int8_products


def test_the_benchmark_multiplies_the_same_by_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_int8_products, "int8_products_alone", lambda *_: None)  # Triton's own, on a GPU only
    found = bench_int8_products.methods(40, 21, 6, "cpu")
    (expected, expected_grad) = (product() for product in found["bfloat16, dequantized"] or ())
    for method in ("int8", "fp8", "fp8, products alone", "bfloat16, products alone"):
        output, grad = (product() for product in found[method] or ())
        assert output.shape == (6, 32) and torch.allclose(output, expected, rtol=0.05, atol=0.02)
        assert grad.shape == (6, 40) and torch.allclose(grad, expected_grad, rtol=0.05, atol=0.02)


def test_the_benchmark_says_what_it_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_int8_products.main([]) == 2
    assert "needs a CUDA GPU, and there is none here" in capsys.readouterr().err
    for argv, message in ((["--models", "2b"], "2b is none of 60m, 1b, 7b"), (["--tile", "128,128"], "is not rows,")):
        with pytest.raises(SystemExit):
            bench_int8_products.main(argv)
        assert message in capsys.readouterr().err
