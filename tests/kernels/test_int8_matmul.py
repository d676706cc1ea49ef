"""The kernel of products in INT8 compiled for GPUs that need not be here; its bits are in test_agreement.py."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_int8_products

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled here")

SHARED_MEMORY = 99 << 10  # bytes that a program may have on consumer cards
CAPABILITIES = (80, 89, 90)


@pytest.mark.parametrize("rows", [4096, 16])
@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_to_products_in_int8(capability: int, forward: bool, rows: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qgalore.kernels.triton import int8_matmul

    kernel = int8_matmul._int8_matmul_kernel
    pointers = {"a": "i8", "b": "i8", "row_scale": "fp32", "row_sum": "fp32", "scale": "bf16", "zero_point": "bf16"}
    m, n, k, warps, stages = int8_matmul.tile(rows)
    constants = {"DEPTH": 2048, "M": m, "N": n, "K": k, "NEIGHBOURS": 8, "SCALES_COLUMNS": forward}
    numbers = ["rows", "columns", "width"]
    types = {name: f"*{kind}" for name, kind in (pointers | {"out": "bf16"}).items()} | dict.fromkeys(numbers, "i32")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    products = [line for line in code.splitlines() if "mma.sync" in line or "wgmma.mma_async" in line]
    assert products and all(".s32.s8.s8" in line for line in products), products[:1]
    assert ("wgmma" in products[0]) == (capability == 90 and rows == 4096)
    assert "cp.async" in code, "loads wait for products"
    assert compiled.metadata.shared <= SHARED_MEMORY


def test_the_benchmark_multiplies_the_same_by_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_int8_products, "int8_products_alone", lambda *_: None)  # Triton's own, on a GPU only
    found = bench_int8_products.methods(40, 21, 6, "cpu")
    (expected, expected_grad) = (product() for product in found["bfloat16, dequantized"] or ())
    for method in ("int8", "bfloat16, products alone"):
        output, grad = (product() for product in found[method] or ())
        assert output.shape == (6, 32) and torch.allclose(output, expected, rtol=0.05, atol=0.01)
        assert grad.shape == (6, 40) and torch.allclose(grad, expected_grad, rtol=0.05, atol=0.01)


def test_the_benchmark_says_what_it_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_int8_products.main([]) == 2
    assert "needs a CUDA GPU, and there is none here" in capsys.readouterr().err
    for argv, message in ((["--models", "2b"], "2b is none of 60m, 1b, 7b"), (["--tile", "128,128"], "is not rows,")):
        with pytest.raises(SystemExit):
            bench_int8_products.main(argv)
        assert message in capsys.readouterr().err
