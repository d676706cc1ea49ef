"""The private names of PyTorch that this project uses, in one list: they may go with any release.

`tests/test_torch_internals.py` fails with the name and the release where one is gone, and where another file uses a
private name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch

NAMES = {
    "torch._C._cuda_beginAllocateCurrentThreadToPool": "memory of CUDA graphs used between two replays",
    "torch._C._cuda_endAllocateToPool": "memory of CUDA graphs used between two replays",
    "torch._C._cuda_releasePool": "memory of CUDA graphs used between two replays",
    "torch._dynamo.config.recompile_limit": "many models that are compiled in one process",
    "torch._foreach_copy_": "one launch for what is written to many weights",
    "torch._foreach_mul": "one launch for the sizes of many directions",
    "torch._functorch.config.donated_buffer": "backward passes of compiled layers that are retained",
    "torch._functorch.config.ban_recompute_materialized_backward": "norms computed again in the backward pass",
    "torch._functorch.partitioners.has_recomputable_rng_ops": "attention that is computed again on a CPU",
    "torch._functorch.partitioners.must_recompute": "attention that is computed again on a CPU",
    "torch._guards.TracingContext": "compiled backward passes that write over the gradients they are given",
    "torch._higher_order_ops.wrap.log": "compiled layers that compute single tensors again",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "compiled backward passes that write over given gradients",
    "torch._inductor.custom_graph_pass.get_hash_for_files": "the cache of what is compiled",
    "torch._inductor.lowering.lowerings": "sums that are kept apart from the norm that follows",
    "torch._inductor.lowering.register_lowering": "sums that are kept apart from the norm that follows",
    "torch._library.opaque_object.get_opaque_type_name": "operands of operators that are no tensors",
    "torch._library.opaque_object.register_opaque_type": "operands of operators that are no tensors",
    "torch._opaque_base.OpaqueBase": "operands of operators that are no tensors",
    "torch.autograd.Variable._execution_engine.queue_callback": "the norm of the gradient after a backward pass",
    "torch.utils._python_dispatch.TorchDispatchMode": "how a model of transformers initialises its parameters",
    "torch.utils._python_dispatch.is_in_torch_dispatch_mode": "layers that something traces",
    "torch.ops.aten._scaled_dot_product_cudnn_attention": "attention by cuDNN",
}
"""Each with what needs it."""


@functools.cache
def internal(name: str) -> Any:
    """What a name of `NAMES` stands for. Raises RuntimeError that says what needs it where PyTorch has it no longer."""
    purpose = NAMES[name]
    try:
        return _found(name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"PyTorch {torch.__version__} has no {name}, which is needed for {purpose}") from error


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:  # an object with attributes, such as torch.ops.aten
        return getattr(_found(module), attribute)


def set_for_process(name: str, value: object) -> None:
    """Give a setting of `NAMES`, such as torch._functorch.config.donated_buffer, another value in this process."""
    internal(name)  # which says what is missing
    module, _, attribute = name.rpartition(".")
    setattr(importlib.import_module(module), attribute, value)


@contextlib.contextmanager
def allocating_in_pool(device: int, pool: Any) -> Iterator[None]:
    """Within it this thread allocates in a pool of CUDA graphs.

    `torch.cuda.use_mem_pool` does so for a MemPool, which the pool of graphs, a pair of numbers, is not.
    """
    internal("torch._C._cuda_beginAllocateCurrentThreadToPool")(device, pool)
    try:
        yield
    finally:
        internal("torch._C._cuda_endAllocateToPool")(device, pool)
        internal("torch._C._cuda_releasePool")(device, pool)
