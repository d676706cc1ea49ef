"""The fastest settings of a run whose planned memory stays below a budget: `--memory_budget`.

What is chosen are flags: the same command with them is the same run. Settings are tried step by step:

1. micro-batches that divide the total batch, tensors of so many layers computed again, gate and up kept in INT8;
2. sums over micro-batches in INT8 as well: where nothing else fits, or where it makes an update faster by 5 %;
3. sums of one layer at a time, `--accumulate_by layer`, where nothing else fits with this rank: if the machine has the
   host memory for the hidden states of all micro-batches;
4. a smaller rank as well, which is another training, where nothing else fits: of seven eighths, six eighths and so on
   the largest that fits, but for one at which micro-batches become so small that a smaller rank is twice as fast;
5. where the full rank is a default, which no flag asks for, and does not fit: the first three with a momentum in parts,
   `--momentum_rank 1/16 --momentum_rest_bits 4`, whose perplexity is 1 % higher, then all with `--recipe orthogonal`,
   whose is 15 % higher (`docs/quality.md`).

On several ranks the first three steps are made for replicas, then for optimizer states that are dealt to them and for
weights that are, too (`--shard`), before a rank is made smaller. Where nothing of all this fits, all of it is made for
optimizer states that wait in host memory, then for weights that do (`--offload`), whose copies may make a run slower.

What is computed again is a knapsack: tensors of layers (`peft_pretraining.models.activations`) with the bytes
that they take and the counted time to make each again. Those of one name are alike in all layers, so that the least
time for so many bytes is found by taking first what costs least time a byte (Dantzig, Operations Research 5 (2), 1957),
which is exact but for a part of one layer: `Candidates` has a chain of such settings for each micro-batch, from all
kept to all computed again, and in a chain the first that fits is the fastest.

Of the settings of a step that fit, the one of the least counted time of an update is taken (`peft_pretraining.speed`).
Where others are as fast to one per cent, one that rounds nothing goes before one that does, then one that computes
nothing again, then the one of the least memory.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch

from peft_pretraining.accumulation.host_memory import free_host_bytes
from peft_pretraining.build import shape_of
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.config.flags import format_size, parse_whole
from peft_pretraining.config.named_method import recorded_method
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.config.shard_checks import ranks_that_share
from peft_pretraining.errors import UserError
from peft_pretraining.memory.lasting import lasting_bytes
from peft_pretraining.memory.passing import PassingBytes
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.plan import plan_of_run
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.activations import ACTIVATIONS, in_flag
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import CARDS, Card
from peft_pretraining.speed.run_speed import counted_seconds, seconds_of_tensors
from qgalore.config import FULL

UNPLANNED_SHARE, OF_COMPILER = 0.01, 64 << 20
"""What is kept free of a budget, as measured peaks are up to a per cent above the plan, and where layers are computed
again up to 53 MB more, while the compiler times its kernels (`docs/performance.md`)."""
Setting = tuple[tuple[str, ...], dict[str, Any]]
"""Flags, and the fields of a group of arguments that they set."""
BY_LAYER = ("--accumulate_by", "layer")
IN_PARTS = ("--momentum_rank", "1/16", "--momentum_rest_bits", "4")
IN_SUBSPACE = ("--recipe", "orthogonal")
MOST_COUNTS = 20
"""Numbers of recomputed layers that are tried, so that a large model is planned as fast as a small one."""
SHARE_OF_CARD, MARGIN = 0.94, 0.03
"""Of a card's memory what a run may take by default, and what is kept free beside what others hold."""
AS_FAST, WORTH_ROUNDING, WORTH_A_RANK = 1.01, 1.05, 2.0
"""Counted times of less than the first ratio are equal, as counts are not exact; sums are rounded for the second, and
the rank is smaller by another eighth for the third."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A setting of the flags that a command line leaves open."""

    flags: tuple[str, ...]
    """Those that are added to the command line."""
    args: RunArgs
    config: ModelConfig
    lasting: dict[Any, dict[str, int]]
    """What other candidates have counted already."""

    @cached_property
    def run(self) -> PlannedRun:
        """The run with this setting, as it is planned."""
        return PlannedRun(self.args, self.config)

    @cached_property
    def peak(self) -> int:
        """The planned peak in bytes."""
        run = self.run
        key = run.args.updates_at_once, run.sum_dtype, self.args.subspace  # all else that lasts is the same everywhere
        if key not in self.lasting:
            self.lasting[key] = lasting_bytes(run)
        return plan_of_run(run, self.lasting[key]).peak_bytes

    @property
    def needs(self) -> int:
        """The planned peak and what is kept free beside it."""
        recomputes = self.args.kept_activations.recomputed_in_words != "none"
        of_compiler = OF_COMPILER if recomputes and self.run.compiled else 0
        return self.peak + int(self.peak * UNPLANNED_SHARE) + of_compiler

    def seconds(self, card: Card) -> float:
        """The counted time of an update."""
        return counted_seconds(self.args, self.config, card)

    def tokens_per_second(self, card: Card) -> float:
        """Counted, of all ranks."""
        return self.args.tokens_per_update / self.seconds(card)


class Ranks(IntEnum):
    """Which ranks are looked at, in the order in which something is given up for memory."""

    OWN = 0
    """That of the command line, or its recipe's."""
    OWN_BY_LAYER = 1
    """The same with sums of one layer at a time."""
    IN_PARTS = 2
    """Where a full rank is a default: the same with `IN_PARTS`, by layer if need be."""
    OF_SUBSPACE = 3
    """There that of `IN_SUBSPACE`."""
    SMALLER = 4


class Candidates:
    """All settings that a command line leaves open, step by step."""

    recipe_flags: tuple[str, ...] = ()
    """Flags of every candidate."""

    def __init__(self, argv: Sequence[str], world_size: int = 1, defaults: Collection[str] = ()) -> None:
        """argv: of `run_pretrain.py`; --batch_size may be left out beside --total_batch_size.

        defaults: names of flags in it that may be changed all the same. Raises UserError.
        """
        self._argv, self._world_size = list(argv), world_size
        given = {token.partition("=")[0].removeprefix("--") for token in argv if token.startswith("--")}
        self._given = given.difference(defaults)
        self._lasting: dict[Any, dict[str, int]] = {}
        self._asked: dict[tuple[str, ...], bool] = {}
        self._sizes = self._parsed_sizes()
        first = self._sizes[-1][1]  # of the smallest micro-batch
        config = shape_of(first.model)
        if config is None:
            raise UserError(
                "--memory_budget cannot work with a model that only transformers' own class reads, whose memory is not "
                "planned: leave it out, or use a model of the project's own"
            )
        self.config = config
        self._kept = [list(self._activations(args)) for _, args in self._sizes]
        self.chains = [self._candidates(each) for each in self._sums(first)]
        """Of each step: in a chain the time grows and the memory falls."""

    @property
    def steps(self) -> list[list[Candidate]]:
        """All candidates of each step with the rank of the command line."""
        return [list(itertools.chain(*chains)) for chains in self.chains]

    @property
    def lower_ranks(self) -> list[list[Candidate]]:
        """All with a smaller rank, by ranks."""
        return [list(itertools.chain(*chains)) for chains in self.lower_chains]

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

    def choose(self, budget: int, card: Card, ranks: Sequence[Ranks] = tuple(Ranks)) -> Candidate | None:
        """The fastest candidate on a card that fits into so many bytes, of the first of `ranks` with one; else None."""
        for rank in ranks:
            if rank == Ranks.OWN:
                chosen = self._fastest_step(self.chains, WORTH_ROUNDING, budget, card)
            elif rank == Ranks.OWN_BY_LAYER:
                chosen = self._fastest_step(self.chains_by_layer, WORTH_ROUNDING, budget, card)
            elif rank == Ranks.SMALLER and self.in_subspace is None:
                chosen = self._fastest_step(self.lower_chains, WORTH_A_RANK, budget, card)
            else:
                other = self.in_parts if rank == Ranks.IN_PARTS else self.in_subspace
                same = (Ranks.SMALLER,) if rank == Ranks.SMALLER else (Ranks.OWN, Ranks.OWN_BY_LAYER)
                chosen = None if other is None else other.choose(budget, card, same)
            if chosen is not None:
                return chosen
        return None

    def _fastest_step(
        self, steps: Sequence[Sequence[list[Candidate]]], worth: float, budget: int, card: Card
    ) -> Candidate | None:
        """Of the first step within `worth` of the least time of all steps the fastest candidate that fits."""
        found = [each for step in steps if (each := _fastest(step, budget, card))]
        limit = worth * min((each.seconds(card) for each in found), default=0.0)
        return next((each for each in found if each.seconds(card) <= limit), None)

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
        return min(itertools.chain(*map(_least_of, ends)), key=lambda each: each.needs)

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

    def _activations(self, args: RunArgs) -> Iterator[list[Setting]]:
        """Chains of flags of what is kept of activations, with the values that they set."""
        if args.by_layer:  # which keeps those of one layer
            yield [((), {})]
            return
        layers = self.config.num_hidden_layers
        yield list(self._recomputing(args))
        if "int8_activations" in self._given or not self._rounds:
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

    def _may(self, *flags: str) -> bool:
        """`_allows`, asked once."""
        if flags not in self._asked:
            self._asked[flags] = self._allows(*flags)
        return self._asked[flags]

    @cached_property
    def _rounds(self) -> bool:
        """Whether kept activations can be rounded, which saves memory in compiled layers alone."""
        args = self._sizes[-1][1]
        return self._allows("--int8_activations") and PlannedRun(args, self.config).compiled

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


def flag_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags of a command line with the text that follows them."""
    for token, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, glued, value = token.partition("=")
        yield name, value if glued else following


def _fastest(chains: Sequence[list[Candidate]], budget: int, card: Card) -> Candidate | None:
    """Of what fits the candidate that gives up the least of those that are as fast as the fastest."""
    first = [(chain, start) for chain in chains if (start := _first_fitting(chain, budget)) is not None]
    limit = AS_FAST * min((chain[start].seconds(card) for chain, start in first), default=0.0)
    found = list[Candidate]()
    for chain, start in first:
        as_fast = itertools.takewhile(lambda each: each.seconds(card) <= limit, chain[start:])
        found += [each for each in as_fast if each.needs <= budget]
    return min(found, key=_by_what_it_gives_up) if found else None


def _first_fitting(chain: list[Candidate], budget: int) -> int | None:
    """The index of the first candidate of a chain that fits; None where none does."""
    start = bisect.bisect_left(chain, True, key=lambda each: each.needs <= budget)
    if start == len(chain):
        # What a layer computes again is there beside what others keep: of few layers the last may take more.
        return next((chain.index(each) for each in _least_of(chain) if each.needs <= budget), None)
    return start


def _least_of(chain: list[Candidate]) -> list[Candidate]:
    """Those of a chain among which is the one of the least memory: steps of eighths and the last."""
    return [*chain[:: max(1, len(chain) // 8)], chain[-1]]


def _by_what_it_gives_up(candidate: Candidate) -> tuple[bool, bool, int]:
    model = candidate.args.model
    return model.int8_activations, model.recomputed_in_words != "none", candidate.peak


def parse_within_budget(
    argv: Sequence[str],
    world_size: int = 1,
    card: Card | None = None,
    program: str = "run_pretrain.py",
) -> RunArgs:
    """Read a command line, with what `--memory_budget` chooses for it where it is given; the usage names `program`.

    Without it what this machine's card has is the budget, of choices that round nothing (`within_card`). card: that the
    run is planned for; None: this machine's, whose memory the budget may not exceed, or else the speed of an H100.
    Raises UserError, also where nothing fits.
    """
    if not _is_given(argv, "memory_budget"):
        found = None if card is not None or _is_given(argv, "device", "cpu") else memory_of_card(world_size)
        return (
            parse_args(argv, world_size, program) if found is None else within_card(argv, world_size, program, *found)
        )
    world_size = _ranks_of(argv, world_size)
    modes = _modes(argv, world_size)
    candidates = next(iter(modes.values()))
    first = candidates.chains[0][0][0].args
    budget = first.runtime.memory_budget
    if card is None and first.runtime.device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        check_card(budget, properties.total_memory, properties.name)
    card = card or card_here()
    chosen, notes = _chosen(modes, budget, card), list[str]()
    if chosen is None:
        modes |= (offloading := _offloading(argv, world_size))
        chosen = _chosen(offloading, budget, card)
        notes += [] if chosen is None else [f"nothing fits without --offload {chosen.args.runtime.offload}"]
    if chosen is None:
        smallest = [dataclasses.replace(x.smallest, flags=(*shard, *x.smallest.flags)) for shard, x in modes.items()]
        least = min(smallest, key=lambda each: each.needs)
        raise UserError(too_small(f"--memory_budget {format_size(budget)}", least))
    args = parse_args([*argv, *chosen.flags], world_size)
    return dataclasses.replace(
        args, command=tuple(argv), notes=(*args.notes, "; ".join([in_words(chosen, card), *notes]))
    )


def _is_given(argv: Sequence[str], name: str, value: str | None = None) -> bool:
    """Whether a command line has a flag, with this value if one is asked for."""
    return any(flag == f"--{name}" and value in (None, text) for flag, text in flag_values(argv))


def memory_of_card(world_size: int) -> tuple[int, Card] | None:
    """What a run may take of this rank's card, by default, and the card; None without one."""
    if not torch.cuda.is_available():
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0
    if local_rank >= torch.cuda.device_count():
        return None  # which the start of the ranks refuses
    return default_budget(*torch.cuda.mem_get_info(local_rank), world_size), card_here()


def default_budget(free: int, total: int, world_size: int = 1) -> int:
    """What a run may take of a card in bytes: a fixed share of it, and no more than is free but for a margin.

    A share of the whole, so that a run on a card of its own chooses the same each time it starts; and of the whole
    alone where ranks must choose alike.
    """
    whole = int(SHARE_OF_CARD * total)
    return whole if world_size > 1 else min(whole, free - int(MARGIN * total))


def within_card(argv: Sequence[str], world_size: int, program: str, budget: int, card: Card) -> RunArgs:
    """Read a command line without --memory_budget for a card of which a run may take so many bytes.

    Where its plan is beyond that, the first layers are computed again, as few as that needs; and where no --batch_size
    is given, but a --total_batch_size, the fastest micro-batch is chosen; where the full rank is a default and does not
    fit so, the same with `IN_PARTS`, then with `IN_SUBSPACE`. Nothing else is rounded for it, and a run that fits, or
    that cannot be made to, is left as it is, which a warning then tells. Raises UserError.
    """
    has_batch = _is_given(argv, "batch_size")
    if not has_batch and not _is_given(argv, "total_batch_size"):
        return parse_args(argv, world_size, program)
    if has_batch:
        args = parse_args(argv, world_size, program)
        config = shape_of(args.model)
        if config is None or Candidate((), args, config, {}).needs <= budget:
            return args
    elif shape_of(parse_args([*argv, "--batch_size", "1"], world_size, program).model) is None:
        return parse_args(argv, world_size, program)  # which asks for a --batch_size: memory is not planned
    candidates = Candidates(argv, world_size)
    chosen = _fastest_unrounded(candidates, budget, card)
    if chosen is None:
        found = (_fastest_unrounded(other, budget, card) for other in candidates.fallbacks)
        chosen = next(filter(None, found), None)
    if chosen is None and has_batch:
        return args
    if chosen is None:
        raise UserError(
            too_small(f"what this card has free, {_with_unit(budget)}, with no --batch_size given", candidates.smallest)
        )
    args = parse_args([*argv, *chosen.flags], world_size)
    told = (
        f"within the {_with_unit(budget)} that this card has for it: {' '.join(chosen.flags)}, with "
        f"{_with_unit(chosen.peak)} planned at the peak; --memory_budget chooses more, and flags that are given stay"
    )
    return dataclasses.replace(args, command=tuple(argv), notes=(*args.notes, told))


def _fastest_unrounded(candidates: Candidates, budget: int, card: Card) -> Candidate | None:
    chains = [each for each in candidates.chains[0] if "--int8_activations" not in each[0].flags]
    return _fastest(chains, budget, card)


def _ranks_of(argv: Sequence[str], world_size: int) -> int:
    """The ranks that a command line is about: with --dry_run those of --nproc."""
    given = [value for name, value in flag_values(argv) if name == "--nproc"]
    described = "--dry_run" in argv and given and given[-1].isdecimal()
    return max(1, int(given[-1])) if described else world_size


def _modes(argv: Sequence[str], world_size: int) -> dict[tuple[str, ...], Candidates]:
    """The candidates by flags of --shard: from replicas to weights with their owners, where that is open."""
    found: dict[tuple[str, ...], Candidates] = {(): Candidates(argv, world_size)}
    if world_size > 1 and not _is_given(argv, "shard"):
        by_owner = () if _is_given(argv, "shard_sums") else ("--shard_sums", "owner")
        for flags in dict.fromkeys(
            [("--shard", "optimizer"), ("--shard", "optimizer", *by_owner), ("--shard", "full")]
        ):
            with contextlib.suppress(UserError):  # a mode that does not go with the other flags
                found[flags] = Candidates([*argv, *flags], world_size)
    return found


def _offloading(argv: Sequence[str], world_size: int) -> dict[tuple[str, ...], Candidates]:
    """The candidates by flags of --offload, where that is open: from states to weights on the host."""
    found: dict[tuple[str, ...], Candidates] = {}
    for offload in () if _is_given(argv, "offload") else ("states", "weights"):
        with contextlib.suppress(UserError):
            found["--offload", offload] = Candidates([*argv, "--offload", offload], world_size)
    return found


def _chosen(modes: dict[tuple[str, ...], Candidates], budget: int, card: Card) -> Candidate | None:
    """The first mode in which something fits: a smaller rank, which is another training, comes after all of them."""
    for rank in Ranks:
        for shard, candidates in modes.items():
            if chosen := candidates.choose(budget, card, (rank,)):
                return dataclasses.replace(chosen, flags=(*shard, *chosen.flags))
    return None


def in_words(chosen: Candidate, card: Card) -> str:
    """What was chosen, the planned peak and the counted speed."""
    flags = " ".join(chosen.flags) or "no flag beside those that are given"
    on_host = ""
    if BY_LAYER[0] in chosen.flags:
        hidden = PassingByLayer(PlannedRun(chosen.args, chosen.config)).host()
        on_host = (
            f", as nothing else fits with this rank, and {_with_unit(hidden)} of hidden states a rank in host memory, "
            "whose copies are not counted as time"
        )
    return (
        f"--memory_budget {format_size(chosen.args.runtime.memory_budget)} chooses {flags}: {_with_unit(chosen.peak)} "
        f"planned at the peak, {chosen.tokens_per_second(card):,.0f} tokens/s counted for {card.name}{on_host}"
    )


def too_small(budget: str, least: Candidate) -> str:
    """The sentence for a budget below the least that works; budget: what the user gave, in words."""
    how = f"with {' '.join(least.flags)}" if least.flags else "with the flags as they are"
    # About a per cent: the few megabytes that a small model takes are not ten.
    step = 10**7 if least.needs >= 10**9 else 10**6 if least.needs >= 10**8 else 10**5
    return f"{budget} is too small: the least that works is {format_size(rounded_up(least.needs, step))}, {how}"


def rounded_up(nbytes: int, step: int = 10**7) -> int:
    """Up to whole steps of so many bytes."""
    return -(-nbytes // step) * step


def _with_unit(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.3g} MB"


def check_card(budget: int, total: int, name: str) -> None:
    """Refuse a budget beyond the memory of the device, `total` bytes: UserError."""
    if budget > total:
        raise UserError(
            f"--memory_budget {format_size(budget)} is more than the {total / 1e9:.1f} GB of this machine's {name}: "
            f"give at most {format_size(total // 10**9 * 10**9)}, of which the context of CUDA takes a part"
        )


def card_here() -> Card:
    """The card of this machine, as far as its speed is known; else an H100, for which counts were compared."""
    name = torch.cuda.get_device_properties(0).name if torch.cuda.is_available() else ""
    known = {each.device or f"NVIDIA {each.name}": each for each in CARDS.values()}
    return known.get(name, CARDS["h100"])
