"""Selective activation checkpointing: a decoder layer computes some of its tensors again and keeps the others.

Where all tensors of `models.activations` are computed again it is activation checkpointing (Chen et al., arXiv
1604.06174). Attention alone, which takes little time in short sequences, is what Korthikanti et al. compute again
(arXiv 2205.05198). Norms, rotations and the product of SwiGLU are computed again in every compiled layer, as its
compiler finds by itself.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` asks a policy for each operation. A layer says which of
its operations make one of these tensors by `makes`, an annotation that stays with them where they are traced. A
compiler is told what to compute again and chooses what else it keeps; without one nothing but these tensors is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch.fx.traceback
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from peft_pretraining.models.activations import ACTIVATIONS

_KEY, _ON_THE_WAY, _VERSION = "activation", " input", 1
_aten = torch.ops.aten
_NOT_KEPT = (_aten.add.Tensor, _aten.constant_pad_nd.default, _aten.view.default, _aten.t.default)
"""Beside a product: biases, which are added again, and views of its operands."""
Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""What `torch.utils.checkpoint.checkpoint` takes as its `context_fn`."""


def makes(name: str, on_the_way: bool = False) -> AbstractContextManager[None]:
    """Operations within it make the tensor of that name, or what it alone is made of."""
    return torch.fx.traceback.annotate({_KEY: name + _ON_THE_WAY * on_the_way})


@cache
def contexts(recomputed: tuple[str, ...], compiled: bool) -> Contexts:
    """The contexts of a layer that computes the tensors of these names again; layers alike have one function."""

    def policy(_: object, operation: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = torch.fx.traceback.current_meta.get("custom", {}).get(_KEY, "")
        if compiled and recomputed == ACTIVATIONS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if compiled:
            again = name.removesuffix(_ON_THE_WAY) in recomputed
            return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE
        kept = name in ACTIVATIONS and name not in recomputed
        kept = kept and (name == "residual" or operation not in _NOT_KEPT)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        forward, again = create_selective_checkpoint_contexts(policy)
        return forward, again

    # PyTorch pickles it by its name to find what it compiled for such a layer in an earlier process.
    context_fn.__name__ = context_fn.__qualname__ = "_".join(("context_fn", *recomputed, *["compiled"] * compiled))
    globals()[context_fn.__name__] = context_fn
    context_fn.cache_hash = f"peft_pretraining {_VERSION}: {','.join(recomputed)}"  # type: ignore[attr-defined]
    return context_fn
