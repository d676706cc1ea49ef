"""Flags of what is kept of activations, in chains from all kept to all computed again.

What is computed again is a knapsack: tensors of layers (`peft_pretraining.models.activations`) with the bytes
that they take and the counted time to make each again. Those of one name are alike in all layers, so that the least
time for so many bytes is found by taking first what costs least time a byte (Dantzig, Operations Research 5 (2), 1957),
which is exact but for a part of one layer: in a chain the first setting that fits is the fastest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any

from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.memory.passing import PassingBytes
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.activations import ACTIVATIONS, in_flag
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import CARDS
from peft_pretraining.speed.run_speed import seconds_of_tensors

Setting = tuple[tuple[str, ...], dict[str, Any]]
"""Flags, and the fields of a group of arguments that they set."""
MOST_COUNTS = 20
"""Numbers of recomputed layers that are tried, so that a large model is planned as fast as a small one."""


class KeptActivations:
    """What a command line may keep of activations."""

    def __init__(self, config: ModelConfig, given: Collection[str], allows: Callable[..., bool]) -> None:
        """given: names of flags that stay as they are; allows: whether the command line may have these flags, too."""
        self.config, self._given = config, set(given)
        self._may = cache(allows)

    def chains(self, args: RunArgs) -> Iterator[list[Setting]]:
        """Chains of flags of what is kept of activations, with the values that they set."""
        if args.by_layer:  # which keeps those of one layer
            yield [((), {})]
            return
        layers = self.config.num_hidden_layers
        yield list(self._recomputing(args))
        if "int8_activations" in self._given or not self._rounds(args):
            return
        rounded = dataclasses.replace(args, model=dataclasses.replace(args.model, int8_activations=True))
        chain = list[Setting]()
        for flags, values in self._recomputing(rounded):
            model = dataclasses.replace(args.model, **values)
            if max(len(model.recomputed(layers)), model.recomputed_tensors(layers)["mlp"]) < layers:
                chain.append(((*flags, "--int8_activations"), values | {"int8_activations": True}))
        if chain:
            yield chain

    def _recomputing(self, args: RunArgs) -> Iterator[Setting]:
        """Flags of what is computed again, from nothing to all."""
        layers, fixed = self.config.num_hidden_layers, args.model.activation_checkpointing
        switch, whole = ("--activation_checkpointing",), {"activation_checkpointing": True}
        step = -(-layers // MOST_COUNTS)
        if self._given & {"checkpoint_every", "checkpoint_layers", "recompute"}:
            yield (), {}
        elif fixed:
            for count in range(step, layers, step) if self._may("--checkpoint_layers", "1") else ():
                yield ("--checkpoint_layers", str(count)), {"checkpoint_layers": count}
            yield (), {}
        else:
            yield (), {}
            for counts in self._tensors(args, step) if self._may("--recompute", "attention") else ():
                text = in_flag(counts, layers)
                yield ("--recompute", text), {"recompute": text}
            if self._may(*switch):
                yield switch, whole

    def _tensors(self, args: RunArgs, step: int) -> Iterator[dict[str, int]]:
        """Layers by the tensors that they compute again, but for all: first what costs the least time a byte."""
        layers, card = self.config.num_hidden_layers, CARDS["h100"]
        nbytes, seconds = (
            PassingBytes(PlannedRun(args, self.config)).parts(),
            seconds_of_tensors(args, self.config, card),
        )
        names = sorted(ACTIVATIONS, key=lambda name: seconds[name] / nbytes[name])
        counts = dict[str, int]()
        for name in names:
            for count in (*range(step, layers, step), layers):
                counts[name] = count
                if count < layers or name != names[-1]:
                    yield counts

    def _rounds(self, args: RunArgs) -> bool:
        """Whether kept activations can be rounded, which saves memory in compiled layers alone."""
        return self._may("--int8_activations") and PlannedRun(args, self.config).compiled
