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
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch

from peft_pretraining.build import shape_of
from peft_pretraining.config.flags import flag_values, format_size, is_given
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.candidate import Candidate
from peft_pretraining.memory.candidates import BY_LAYER, Candidates
from peft_pretraining.memory.card_memory import card_here, check_card, memory_of_card
from peft_pretraining.memory.choice import Ranks, choose, fastest_unrounded
from peft_pretraining.memory.passing_by_layer import PassingByLayer
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.speed.cards import Card


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
    if not is_given(argv, "memory_budget"):
        found = None if card is not None or is_given(argv, "device", "cpu") else memory_of_card(world_size)
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


def within_card(argv: Sequence[str], world_size: int, program: str, budget: int, card: Card) -> RunArgs:
    """Read a command line without --memory_budget for a card of which a run may take so many bytes.

    Where its plan is beyond that, the first layers are computed again, as few as that needs; and where no --batch_size
    is given, but a --total_batch_size, the fastest micro-batch is chosen; where the full rank is a default and does not
    fit so, the same with `IN_PARTS`, then with `IN_SUBSPACE`. Nothing else is rounded for it, and a run that fits, or
    that cannot be made to, is left as it is, which a warning then tells. Raises UserError.
    """
    has_batch = is_given(argv, "batch_size")
    if not has_batch and not is_given(argv, "total_batch_size"):
        return parse_args(argv, world_size, program)
    if has_batch:
        args = parse_args(argv, world_size, program)
        config = shape_of(args.model)
        if config is None or Candidate((), args, config, {}).needs <= budget:
            return args
    elif shape_of(parse_args([*argv, "--batch_size", "1"], world_size, program).model) is None:
        return parse_args(argv, world_size, program)  # which asks for a --batch_size: memory is not planned
    candidates = Candidates(argv, world_size)
    chosen = fastest_unrounded(candidates, budget, card)
    if chosen is None:
        found = (fastest_unrounded(other, budget, card) for other in candidates.fallbacks)
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


def _ranks_of(argv: Sequence[str], world_size: int) -> int:
    """The ranks that a command line is about: with --dry_run those of --nproc."""
    given = [value for name, value in flag_values(argv) if name == "--nproc"]
    described = "--dry_run" in argv and given and given[-1].isdecimal()
    return max(1, int(given[-1])) if described else world_size


def _modes(argv: Sequence[str], world_size: int) -> dict[tuple[str, ...], Candidates]:
    """The candidates by flags of --shard: from replicas to weights with their owners, where that is open."""
    found: dict[tuple[str, ...], Candidates] = {(): Candidates(argv, world_size)}
    if world_size > 1 and not is_given(argv, "shard"):
        by_owner = () if is_given(argv, "shard_sums") else ("--shard_sums", "owner")
        for flags in dict.fromkeys(
            [("--shard", "optimizer"), ("--shard", "optimizer", *by_owner), ("--shard", "full")]
        ):
            with contextlib.suppress(UserError):  # a mode that does not go with the other flags
                found[flags] = Candidates([*argv, *flags], world_size)
    return found


def _offloading(argv: Sequence[str], world_size: int) -> dict[tuple[str, ...], Candidates]:
    """The candidates by flags of --offload, where that is open: from states to weights on the host."""
    found: dict[tuple[str, ...], Candidates] = {}
    for offload in () if is_given(argv, "offload") else ("states", "weights"):
        with contextlib.suppress(UserError):
            found["--offload", offload] = Candidates([*argv, "--offload", offload], world_size)
    return found


def _chosen(modes: dict[tuple[str, ...], Candidates], budget: int, card: Card) -> Candidate | None:
    """The first mode in which something fits: a smaller rank, which is another training, comes after all of them."""
    for rank in Ranks:
        for shard, candidates in modes.items():
            if chosen := choose(candidates, budget, card, (rank,)):
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
