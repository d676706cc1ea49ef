"""The fastest settings of a run whose planned memory stays below a budget: `--memory_budget`.

What is chosen are flags: the same command with them is the same run. Settings are tried in three steps:

1. micro-batches that divide the total batch, one in so many layers computed again, gate and up kept in INT8;
2. sums over micro-batches in INT8 as well: where nothing else fits, or where it makes an update faster by 5 %;
3. a smaller rank as well, which is another training, where nothing else fits: of seven eighths, six eighths and so on
   the largest that fits, but for one at which micro-batches become so small that a smaller rank is twice as fast.

On several ranks the first two steps are made for replicas, then for optimizer states that are dealt to them and for
weights that are, too (`--shard`), before a rank is made smaller.

Of the settings of a step that fit, the one of the least counted time of an update is taken (`peft_pretraining.speed`).
Where others are as fast to one per cent, one that rounds nothing goes before one that does, then one that computes
nothing again, then the one of the least memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from peft_pretraining.build import shape_of
from peft_pretraining.config.flag_groups import LIBRARY_OPTIMIZERS
from peft_pretraining.config.flags import format_size, parse_whole
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.lasting import lasting_bytes
from peft_pretraining.memory.plan import plan_of_run
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.speed.cards import CARDS, Card
from peft_pretraining.speed.run_speed import counted_seconds
from qgalore.config import FULL

UNPLANNED_SHARE, OF_COMPILER = 0.01, 64 << 20
"""What is kept free of a budget, as measured peaks are up to a per cent above the plan, and where layers are computed
again up to 53 MB more, while the compiler times its kernels (`docs/performance.md`)."""
Setting = tuple[tuple[str, ...], dict[str, Any]]
"""Flags, and the fields of a group of arguments that they set."""
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
    def peak(self) -> int:
        """The planned peak in bytes."""
        run = PlannedRun(self.args, self.config)
        key = run.updates_at_once, run.sum_dtype, self.args.subspace  # all else that lasts is the same everywhere
        if key not in self.lasting:
            self.lasting[key] = lasting_bytes(run)
        return plan_of_run(run, self.lasting[key]).peak_bytes

    @property
    def needs(self) -> int:
        """The planned peak and what is kept free beside it."""
        again = OF_COMPILER if self.args.model.activation_checkpointing else 0
        return self.peak + int(self.peak * UNPLANNED_SHARE) + again

    def seconds(self, card: Card) -> float:
        """The counted time of an update."""
        return counted_seconds(self.args, self.config, card)

    def tokens_per_second(self, card: Card) -> float:
        """Counted, of all ranks."""
        return self.args.tokens_per_update / self.seconds(card)


class Candidates:
    """All settings that a command line leaves open, step by step."""

    def __init__(self, argv: Sequence[str], world_size: int = 1, defaults: Collection[str] = ()) -> None:
        """argv: of `run_pretrain.py`; --batch_size may be left out beside --total_batch_size.

        defaults: names of flags in it that may be changed all the same. Raises UserError.
        """
        self._argv, self._world_size = list(argv), world_size
        given = {token.partition("=")[0].removeprefix("--") for token in argv if token.startswith("--")}
        self._given = given.difference(defaults)
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
        plain, sums = list(self._activations(first)), self._sums(first)
        self.steps = [self._candidates(plain, each) for each in sums]
        self.lower_ranks = [self._candidates(plain, sums[-1], rank) for rank in self._ranks(first)]

    def choose(self, budget: int, card: Card, ranks: Collection[bool] = (False, True)) -> Candidate | None:
        """The fastest candidate on a card that fits into so many bytes; None if there is none.

        ranks: True for smaller ranks, False for that of the command, or both, in this order.
        """
        if self.smallest.needs > budget:
            return None
        of_ranks = {False: (self.steps, WORTH_ROUNDING), True: (self.lower_ranks, WORTH_A_RANK)}
        for steps, worth in (of_ranks[lower] for lower in ranks):
            if found := [each for step in steps if (each := _fastest(step, budget, card))]:
                limit = worth * min(each.seconds(card) for each in found)
                return next(each for each in found if each.seconds(card) <= limit)
        return None

    @cached_property
    def smallest(self) -> Candidate:
        """The candidate of the least memory."""
        return min(itertools.chain(*self.steps, *self.lower_ranks[-1:]), key=lambda each: each.needs)

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

    def _activations(self, first: RunArgs) -> Iterator[Setting]:
        """Flags of what is kept of activations, with the values that they set."""
        given, layers = self._given, self.config.num_hidden_layers
        again: list[Setting] = [((), {})]
        fixed = first.model.activation_checkpointing
        switch = () if fixed else ("--activation_checkpointing",)
        if "checkpoint_every" not in given and (fixed or self._allows(*switch)):
            again = [] if fixed else again
            # 1 in N layers: N only where it makes another number of them.
            counts = {-(-layers // every): every for every in range(layers, 0, -1)}
            in_part = self._allows(*switch, "--checkpoint_every", "2")
            for every in sorted(counts.values(), reverse=True):
                sparse = ("--checkpoint_every", str(every)) if every > 1 else ()
                if every == 1 or in_part:
                    values: dict[str, Any] = {"activation_checkpointing": True, "checkpoint_every": every}
                    again.append(((*switch, *sparse), values))
        for flags, values in again:
            yield flags, values
            model = dataclasses.replace(first.model, **values)
            every_layer = model.activation_checkpointing and model.checkpoint_every == 1
            if not every_layer and "int8_activations" not in given and self._rounds:
                yield (*flags, "--int8_activations"), values | {"int8_activations": True}

    @cached_property
    def _rounds(self) -> bool:
        """Whether kept activations can be rounded, which saves memory in compiled layers alone."""
        args = self._sizes[-1][1]
        return self._allows("--int8_activations") and PlannedRun(args, self.config).compiled

    def _candidates(self, activations: Sequence[Setting], sums: Setting, rank: int | None = None) -> list[Candidate]:
        found = []
        for (size, args), (keep, model) in itertools.product(self._sizes, activations):
            # With one micro-batch there is nothing to sum.
            add, optimizer = sums if args.batch.gradient_accumulation > 1 else ((), {})
            changed = dataclasses.replace(
                args,
                model=dataclasses.replace(args.model, **model),
                optimizer=dataclasses.replace(args.optimizer, **optimizer),
                subspace=dataclasses.replace(args.subspace, rank=rank) if rank else args.subspace,
            )
            lower = ("--rank", str(rank)) if rank else ()
            found.append(Candidate((*size, *keep, *add, *lower), changed, self.config, self._lasting))
        return found


def flag_values(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Flags of a command line with the text that follows them."""
    for token, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, glued, value = token.partition("=")
        yield name, value if glued else following


def _fastest(candidates: Sequence[Candidate], budget: int, card: Card) -> Candidate | None:
    found: list[Candidate] = []
    for each in sorted(candidates, key=lambda each: each.seconds(card)):
        if found and each.seconds(card) > AS_FAST * found[0].seconds(card):
            break
        if each.needs <= budget:
            found.append(each)
    return min(found, key=_by_what_it_gives_up) if found else None


def _by_what_it_gives_up(candidate: Candidate) -> tuple[bool, bool, int]:
    model = candidate.args.model
    return model.int8_activations, model.activation_checkpointing, candidate.peak


def parse_within_budget(
    argv: Sequence[str],
    world_size: int = 1,
    card: Card | None = None,
    program: str = "run_pretrain.py",
) -> RunArgs:
    """Read a command line, with what `--memory_budget` chooses for it where it is given; the usage names `program`.

    card: that the run is planned for; None: this machine's, whose memory the budget may not exceed, or else the speed
    of an H100. Raises UserError, also where nothing fits.
    """
    if not any(token.partition("=")[0] == "--memory_budget" for token in argv):
        return parse_args(argv, world_size, program)
    world_size = _ranks_of(argv, world_size)
    modes = _modes(argv, world_size)
    candidates = next(iter(modes.values()))
    first = candidates.steps[0][0].args
    budget = first.runtime.memory_budget
    if card is None and first.runtime.device != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        check_card(budget, properties.total_memory, properties.name)
    card = card or card_here()
    chosen = _chosen(modes, budget, card)
    if chosen is None:
        shard, last = list(modes.items())[-1]
        least = dataclasses.replace(last.smallest, flags=(*shard, *last.smallest.flags))
        raise UserError(too_small(f"--memory_budget {format_size(budget)}", least))
    args = parse_args([*argv, *chosen.flags], world_size)
    return dataclasses.replace(args, command=tuple(argv), notes=(*args.notes, in_words(chosen, card)))


def _ranks_of(argv: Sequence[str], world_size: int) -> int:
    """The ranks that a command line is about: with --dry_run those of --nproc."""
    given = [value for name, value in flag_values(argv) if name == "--nproc"]
    described = "--dry_run" in argv and given and given[-1].isdecimal()
    return max(1, int(given[-1])) if described else world_size


def _modes(argv: Sequence[str], world_size: int) -> dict[tuple[str, ...], Candidates]:
    """The candidates by flags of --shard: from replicas to weights with their owners, where that is open."""
    found: dict[tuple[str, ...], Candidates] = {(): Candidates(argv, world_size)}
    if world_size > 1 and not any(token.partition("=")[0] == "--shard" for token in argv):
        for shard in ("optimizer", "full"):
            with contextlib.suppress(UserError):  # a mode that does not go with the other flags
                found["--shard", shard] = Candidates([*argv, "--shard", shard], world_size)
    return found


def _chosen(modes: dict[tuple[str, ...], Candidates], budget: int, card: Card) -> Candidate | None:
    """The first mode in which something fits: a smaller rank, which is another training, comes after all of them."""
    for lower in (False, True):
        for shard, candidates in modes.items():
            if chosen := candidates.choose(budget, card, (lower,)):
                return dataclasses.replace(chosen, flags=(*shard, *chosen.flags))
    return None


def in_words(chosen: Candidate, card: Card) -> str:
    """What was chosen, the planned peak and the counted speed."""
    flags = " ".join(chosen.flags) or "no flag, as all are given"
    return (
        f"--memory_budget {format_size(chosen.args.runtime.memory_budget)} chooses {flags}: {_with_unit(chosen.peak)} "
        f"planned at the peak, {chosen.tokens_per_second(card):,.0f} tokens/s counted for {card.name}"
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
