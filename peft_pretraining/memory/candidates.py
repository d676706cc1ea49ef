"""All settings that a command line leaves open, in the steps in which `--memory_budget` tries them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any

from peft_pretraining.accumulation.host_memory import free_host_bytes
from peft_pretraining.build import shape_of
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.config.flags import flag_values, names_given, parse_whole
from peft_pretraining.config.named_method import recorded_method
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.config.shard_checks import ranks_that_share
from peft_pretraining.errors import UserError
from peft_pretraining.memory.candidate import Candidate, least_of
from peft_pretraining.memory.kept_activations import KeptActivations, Setting
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.planned_run import PlannedRun
from qgalore.config import FULL

BY_LAYER = ("--accumulate_by", "layer")
IN_PARTS = ("--momentum_rank", "1/16", "--momentum_rest_bits", "4")
IN_SUBSPACE = ("--recipe", "orthogonal")


class Candidates:
    """All settings that a command line leaves open, step by step."""

    recipe_flags: tuple[str, ...] = ()
    """Flags of every candidate."""

    def __init__(self, argv: Sequence[str], world_size: int = 1, defaults: Collection[str] = ()) -> None:
        """argv: of `run_pretrain.py`; --batch_size may be left out beside --total_batch_size.

        defaults: names of flags in it that may be changed all the same. Raises UserError.
        """
        self._argv, self._world_size = list(argv), world_size
        self._given = names_given(argv).difference(defaults)
        self._lasting: dict[Any, dict[str, int]] = {}
        self._sizes = self._parsed_sizes()
        first = self._sizes[-1][1]  # of the smallest micro-batch
        config = shape_of(first.model)
        if config is None:
            raise UserError(
                "--memory_budget cannot work with a model that only transformers' own class reads, whose memory is not "
                "planned: leave it out, or use a model of the project's own"
            )
        self.config = config
        kept = KeptActivations(config, self._given, self._allows)
        self._kept = [list(kept.chains(args)) for _, args in self._sizes]
        self.chains = [self._candidates(each) for each in self._sums(first)]
        """Of each step: in a chain the time grows and the memory falls."""

    @property
    def steps(self) -> list[list[Candidate]]:
        """All candidates of each step with the rank of the command line."""
        return [list(itertools.chain(*chains)) for chains in self.chains]

    @cached_property
    def chains_by_layer(self) -> list[list[list[Candidate]]]:
        """Those of `BY_LAYER`, whose hidden states fit in the free host memory; none where that is not open."""
        given = {"accumulate_by", "activation_checkpointing", "checkpoint_every", "checkpoint_layers", "recompute"}
        if self._given & (given | {"int8_activations"}) or not self._allows(*BY_LAYER):
            return []
        free, found = free_host_bytes(), list[list[Candidate]]()
        for size, args in self._sizes:
            if args.batch.gradient_accumulation > 1 and (by_layer := self._allowed(*size, *BY_LAYER)):
                host = PassingByLayer(PlannedRun(by_layer, self.config)).host() * ranks_that_share(self._world_size)
                if free is None or host <= free:
                    flags = (*self.recipe_flags, *size, *BY_LAYER)
                    found.append([Candidate(flags, by_layer, self.config, self._lasting)])
        return [found] if found else []

    @cached_property
    def lower_chains(self) -> list[list[list[Candidate]]]:
        """Chains by smaller ranks, from large to small."""
        first = self._sizes[-1][1]
        return [self._candidates(self._sums(first)[-1], rank) for rank in self._ranks(first)]

    @cached_property
    def in_parts(self) -> Candidates | None:
        """The same command line with a momentum in parts; None where how it is kept is chosen, as its rank may be."""
        return None if "momentum_rank" in self._given else self._fallback(IN_PARTS)

    @cached_property
    def in_subspace(self) -> Candidates | None:
        """The same command line with a subspace; None where its rank or recipe is chosen, by a flag or a checkpoint."""
        return self._fallback(IN_SUBSPACE)

    @property
    def fallbacks(self) -> Iterator[Candidates]:
        """What takes the place of a full rank that is a default, in the order in which it is tried."""
        if self.in_parts is not None:
            yield self.in_parts
        if self.in_subspace is not None:
            yield self.in_subspace

    def _fallback(self, flags: tuple[str, ...]) -> Candidates | None:
        first = self._sizes[-1][1]
        chosen = "recipe" in self._given or first.optimizer.recipe != "full_rank" or "rank" in self._given
        if chosen or not first.optimizer.is_low_rank or _goes_on_with_recipe(first):
            return None
        try:
            return _WithFlags(self._argv, flags, self._world_size)
        except UserError:  # of other flags, such as those of a full momentum
            return None

    @cached_property
    def own_smallest(self) -> Candidate:
        """The candidate of the least memory of those with the recipe of the command line."""
        ends = itertools.chain(*self.chains, *self.chains_by_layer, *self.lower_chains[-1:])
        return min(itertools.chain(*map(least_of, ends)), key=lambda each: each.needs)

    @property
    def smallest(self) -> Candidate:
        """The candidate of the least memory."""
        found = [self.own_smallest, *(other.smallest for other in self.fallbacks)]
        return min(found, key=lambda each: each.needs)

    # ---- what is open

    def _parsed_sizes(self) -> list[tuple[tuple[str, ...], RunArgs]]:
        """The command line with each micro-batch that divides its total batch, from the largest to the smallest."""
        if "batch_size" in self._given:
            return [((), self._parse())]
        if "total_batch_size" not in self._given:
            raise UserError(
                "--memory_budget chooses --batch_size where the sequences of an update are given: give "
                "--total_batch_size, such as 512 in the papers, or --batch_size"
            )
        text = [value for name, value in flag_values(self._argv) if name == "--total_batch_size"][-1]
        found = list[tuple[tuple[str, ...], RunArgs]]()
        try:
            total = parse_whole(text)
        except ValueError:
            total = 0  # which is refused below
        for size in range(total // self._world_size, 0, -1):
            flags: tuple[str, ...] = ("--batch_size", str(size))
            if total % (size * self._world_size) == 0 and (args := self._allowed(*flags)):
                found.append((flags, args))
        return found or [(("--batch_size", "1"), self._parse("--batch_size", "1"))]  # which raises

    def _parse(self, *flags: str) -> RunArgs:
        return parse_args([*self._argv, *flags], self._world_size)

    def _allowed(self, *flags: str) -> RunArgs | None:
        """The command line with these flags, too; None where it may not have them, such as clipping without a sum."""
        try:
            return self._parse(*flags)
        except UserError:
            return None

    def _allows(self, *flags: str) -> bool:
        return self._allowed(*self._sizes[-1][0], *flags) is not None

    def _sums(self, first: RunArgs) -> list[Setting]:
        """Flags of sums over micro-batches: as they are, and in INT8."""
        open_ = "grad_accum_dtype" not in self._given and first.optimizer.optimizer not in LIBRARY_OPTIMIZERS
        in_int8: Setting = ("--grad_accum_dtype", "int8"), {"grad_accum_dtype": "int8"}
        return [((), {}), in_int8] if open_ else [((), {})]

    def _ranks(self, first: RunArgs) -> list[int]:
        """Smaller ranks, from large to small."""
        if not first.optimizer.is_low_rank or first.subspace.rank == FULL or "rank" in self._given:
            return []
        return [rank for eighths in range(7, 0, -1) if (rank := first.subspace.dimensions * eighths // 8)]

    def _candidates(self, sums: Setting, rank: int | None = None) -> list[list[Candidate]]:
        """The chains of all micro-batches."""
        found = []
        for (size, args), chains in zip(self._sizes, self._kept, strict=True):
            # With one micro-batch there is nothing to sum.
            add, optimizer = sums if args.batch.gradient_accumulation > 1 else ((), {})
            of_size = dataclasses.replace(
                args,
                optimizer=dataclasses.replace(args.optimizer, **optimizer),
                subspace=dataclasses.replace(args.subspace, rank=rank) if rank else args.subspace,
            )
            lower = ("--rank", str(rank)) if rank else ()
            for chain in chains:
                models = [(keep, dataclasses.replace(args.model, **values)) for keep, values in chain]
                found.append(
                    [
                        Candidate(
                            (*self.recipe_flags, *size, *keep, *add, *lower),
                            dataclasses.replace(of_size, model=model), self.config, self._lasting,
                        )
                        for keep, model in models
                    ]
                )  # fmt: skip
        return found


class _WithFlags(Candidates):
    """The settings of a command line that some flags end, which are flags of each."""

    def __init__(self, argv: Sequence[str], flags: tuple[str, ...], world_size: int) -> None:
        self.recipe_flags = flags
        super().__init__([*argv, *flags], world_size)


def _goes_on_with_recipe(args: RunArgs) -> bool:
    """Whether a run goes on from a checkpoint that says what its recipe is."""
    source = {"continue_from": args.checkpoint.continue_from, "save_dir": args.checkpoint.save_dir}
    return "recipe" in recorded_method({**source, "optimizer": args.optimizer.optimizer})
