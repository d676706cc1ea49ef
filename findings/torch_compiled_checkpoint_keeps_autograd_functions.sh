#!/usr/bin/env bash
# Activation checkpointing under torch.compile keeps what an operator computes that is called within a custom
# torch.autograd.Function, instead of computing it again: PyTorch 2.11.0 tags the operations of a checkpointed region one
# graph deep, and the body of an autograd.Function is a graph within. The same operator with a backward pass of its own
# (torch.library.register_autograd) is computed again, and so is the Function where the checkpoint gets a context_fn whose
# policy says so for every operation. Nothing is said, gradients are right; the memory that checkpointing is there to save
# is taken all the same (a 7B model: 23 GB in place of 13). 2.13.0 computes all three again.
# The wheel's CUDA libraries are downloaded, though none is used.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.2.6
"$folder/venv/bin/python" -W ignore - 2>"$folder/warnings" <<'PY' || { cat "$folder/warnings"; exit 1; }
import platform
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

print("torch", torch.__version__, "python", platform.python_version())


@torch.library.custom_op("demo::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


@product.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[1])


def backward(ctx, grad):
    x, w = ctx.saved_tensors
    return grad @ w.T, x.T @ grad


torch.library.register_autograd(
    "demo::product", backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(ctx, grad):
        return backward(ctx, grad)


def layer(x, w, multiply):
    return multiply(multiply(x, w).sin(), w).sin()


def always(ctx, op, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


def contexts():
    return create_selective_checkpoint_contexts(always)


def kept(multiply, **options):
    """Bytes that a compiled, checkpointed layer keeps for its backward pass, beside its inputs."""
    torch.compiler.reset()
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    run = torch.compile(
        lambda x, w: checkpoint(layer, x, w, multiply, use_reentrant=False, **options),
        fullgraph=True, backend="aot_eager_decomp_partition",
    )
    inputs, found = {x.data_ptr(), w.data_ptr()}, {}

    def pack(t):
        if t.data_ptr() not in inputs and t.dim():
            found[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x, w)
    out.sum().backward()
    return sum(t.nbytes for t in found.values())


found = {
    "an operator with its own backward pass": kept(product),
    "the operator in a torch.autograd.Function": kept(Product.apply),
    "the same with a policy that computes everything again": kept(Product.apply, context_fn=contexts),
}
for name, count in found.items():
    print(f"{name}, checkpointed and compiled: {count} bytes kept for the backward pass")
assert list(found.values()) == [0, 2 * 64 * 32 * 4, 0], "the behaviour has changed"
print("as described: what is computed within the Function is kept")
PY
