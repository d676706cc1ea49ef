"""What `torch.compile` is told about the two passes of a layer."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qgalore.torch_internals import internal


def recomputes_random(module: GraphModule) -> bool:
    """Whether what is computed again draws random numbers, as PyTorch asks: attention without dropout draws none.

    PyTorch takes it for random whatever the dropout and, on a CPU, keeps the generator's state for it behind the opaque
    objects that a backward pass needs, where it then reads tensors: it fails (2.11, 2.13). On a GPU it is an input.
    """
    must_recompute = internal("torch._functorch.partitioners.must_recompute")
    return any(must_recompute(node) and _draws(node) for node in module.graph.nodes)


def _draws(node: Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    values = dict(zip(names, node.args, strict=False)) | node.kwargs
    return "dropout_p" not in names or values.get("dropout_p", 0.0) != 0.0


def _is_not_about_contexts(record: logging.LogRecord) -> bool:
    return "context_fn" not in str(record.msg)


def allow_selective_checkpoints() -> None:
    """Leave out PyTorch's warning that a selective checkpoint must have no operation in place: a layer has none."""
    internal("torch._higher_order_ops.wrap.log").addFilter(_is_not_about_contexts)


_CustomGraphPass: Any = internal("torch._inductor.custom_graph_pass.CustomGraphPass")


class GivesUpGradients(_CustomGraphPass):
    """The code generator may write over the gradients that a backward pass is given.

    For a function whose outputs have one user each: nobody else needs those gradients then. A decoder layer writes the
    gradient of its input where that of its output was, so that a stack of layers needs one buffer for all of them.
    PyTorch gives up what the forward pass has saved in the same way ("donated buffers"), but not what it is handed.
    """

    def __call__(self, graph: Graph) -> None:
        """Mark the gradients of outputs, if it is a backward pass that is compiled."""
        given = [
            index for index, node in enumerate(graph.find_nodes(op="placeholder")) if node.name.startswith("tangents")
        ]
        context = internal("torch._guards.TracingContext").try_get()
        if given and context is not None and context.fw_metadata is not None:
            # For the code generator alone: by its own list PyTorch refuses to run a backward pass that is retained.
            context.fw_metadata = copy.copy(context.fw_metadata)
            context.fw_metadata.bw_donated_idxs = [*(context.fw_metadata.bw_donated_idxs or []), *given]

    def __eq__(self, other: object) -> bool:
        """All are one: what was compiled for one model serves the next of the same shape."""
        return isinstance(other, GivesUpGradients)

    def __hash__(self) -> int:
        """See `__eq__`."""
        return hash(GivesUpGradients)

    def uuid(self) -> bytes:
        """Of this file: what was compiled with another version of it is compiled again."""
        files: bytes = internal("torch._inductor.custom_graph_pass.get_hash_for_files")((__file__,))
        return files
