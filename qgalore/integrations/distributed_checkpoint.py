"""A model and its optimizer as `torch.distributed.checkpoint` saves and loads them: `TrainingState`.

Of the functions of torch.distributed.checkpoint.state_dict, `get_optimizer_state_dict` works where the optimizer has
state, and `set_optimizer_state_dict` does not: it leaves out parameters that need no gradient, as integers cannot
(findings/torch_dcp_drops_state_without_grad.sh). A load also needs tensors of the right shapes to write into, which
torch makes by a step with zero gradients: quantized weights get none. Here the states are those before an update, and
what has no fixed shape is saved as lists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qgalore.integrations.connection import unwrapped
from qgalore.update.weight import HOST_STATE


class TrainingState:
    """`dcp.save({"training": TrainingState(model, optimizer)}, checkpoint_id=folder)`; `dcp.load` likewise.

    The whole state goes on to the bit. Every rank has all of it, as in data parallelism; `dcp` writes it once.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        """optimizer: a `LowRankAdamW`, or what accelerate has made of it; all its parameters are the model's."""
        self.model, self.optimizer = model, unwrapped(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the model, and that of the optimizer by names of parameters.

        Weights without an update get the state that they would begin with, which changes nothing. Raises ValueError
        for a parameter that the model does not have.
        """
        names = self._names()
        for weight in self.optimizer.weights_of(self.model):
            weight.init_state()
        saved = self.optimizer.state_dict()
        groups = [group | {"params": [names[index] for index in group["params"]]} for group in saved["param_groups"]]
        states = {names[index]: _listed(state) for index, state in saved["state"].items()}
        return {"model": self.model.state_dict(), "optimizer": {"state": states, "param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave. Raises as the two `load_state_dict` do for those of another model."""
        self.model.load_state_dict(state_dict["model"])
        saved = state_dict["optimizer"]
        states = {name: _unlisted(state) for name, state in saved["state"].items()}
        self.optimizer.load_state_dict({"state": states, "param_groups": saved["param_groups"]})

    def _names(self) -> dict[int, str]:
        """The names of the optimizer's parameters by their positions in its groups."""
        names = {param: name for name, param in self.model.named_parameters()}
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        unknown = sum(param not in names for param in params)
        if unknown:
            raise ValueError(
                f"{unknown} parameters of the optimizer are not in {type(self.model).__name__}: give the model that "
                "the optimizer was made for, and not a wrapper's copy"
            )
        return {index: names[param] for index, param in enumerate(params)}


def _listed(state: dict[str, Tensor]) -> dict[str, Any]:
    """The state of a weight with its counters as lists, which `dcp` loads whatever their length was."""
    return {name: [value.tolist()] if name in HOST_STATE else value for name, value in state.items()}


def _unlisted(state: dict[str, Any]) -> dict[str, Tensor]:
    dtypes = {name: torch.float64 if name == "similarities" else torch.int64 for name in HOST_STATE}
    return {
        name: torch.tensor(value[0], dtype=dtypes[name], device="cpu") if name in HOST_STATE else value
        for name, value in state.items()
    }
