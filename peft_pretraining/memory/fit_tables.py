"""Tables of what trains in the memory of a card, as text that is Markdown, too."""

from __future__ import annotations

from collections.abc import Sequence

from peft_pretraining.memory.budget import rounded_up
from peft_pretraining.memory.shipped_runs import Fit, ShippedRun
from peft_pretraining.speed.cards import CARDS, NOT_MEASURED, Card
from peft_pretraining.speed.measured_speeds import MEASURED_SPEEDS, SOURCE
from peft_pretraining.speed.run_speed import MOST_OF_PUBLISHED, SHARE_OF_FLOOR
from peft_pretraining.speed.text_table import text_table


def details(budget: int, card: Card, models: Sequence[str], flags: Sequence[str]) -> str:
    """A memory in bytes: how each model trains there, at which speed, for how many days. Raises UserError."""
    fits = [ShippedRun(name, flags).fit(budget, card) for name in models]
    ranks = fits[0].least.args.world_size
    such, each_has = ("one such card", "") if ranks == 1 else (f"{ranks} such cards", " of each")
    head = ["model", "micro-batch", "length", "rank", "recomputed", "in INT8", "planned GB", "tokens/s", "", "days"]
    return "\n".join(
        [
            f"What trains in {budget / 1e9:g} GB (10^9 bytes){each_has}, at the speed of {_cards(card, ranks)}:",
            "",
            text_table([head, *(_details_of(fit) for fit in fits)]),
            "",
            "Micro-batches an update x sequences; recomputed: decoder layers whose activations are not kept, or which",
            "of them in how many layers, as --recompute has it; days: of as many tokens as the paper's run,",
            f"on {such}, for the models that the paper has.",
            *_sources(card, fits),
        ]
    )


def _cards(card: Card, ranks: int) -> str:
    """In words; of several the time of messages between them is not counted."""
    return card.name if ranks == 1 else f"{ranks} x {card.name}, without the time of messages"


def _details_of(fit: Fit) -> list[str]:
    if fit.chosen is None:
        return [fit.model.upper(), f"at least {_gigabytes(fit)} GB", *["-"] * 8]
    args, days = fit.chosen.args, fit.days
    in_int8 = ["activations"] * args.model.int8_activations
    in_int8 += ["sums"] * (args.optimizer.grad_accum_dtype == "int8" and args.batch.gradient_accumulation > 1)
    return [
        fit.model.upper(),
        f"{args.batch.gradient_accumulation} x {args.batch.batch_size}",
        str(args.batch.max_length),
        str(args.subspace.rank) if args.optimizer.is_low_rank else "-",
        args.model.recomputed_in_words,
        ", ".join(in_int8) or "-",
        f"{fit.chosen.peak / 1e9:.2f}",
        f"{fit.tokens_per_second:,.0f}",
        "measured" if fit.row else "counted",
        "-" if days is None else days_in_words(days),
    ]


def days_in_words(days: float) -> str:
    """Days with two digits or, from ten on, whole ones."""
    return f"{days:,.0f}" if days >= 10 else f"{days:.2g}"


def _gigabytes(fit: Fit) -> str:
    return f"{rounded_up(fit.least.needs) / 1e9:.2f}"


def _sources(card: Card, fits: Sequence[Fit]) -> list[str]:
    """Where the speeds are from."""
    shares = [
        f"{each * 100:.0f} %"
        for each in (card.ceilings[0] / card.tflops / 1e12, card.ceilings[1] / card.bandwidth / 1e9)
    ]
    lines = [
        f"Counted: operations and bytes of an update over {shares[0]} of {card.tflops:g} TFLOP/s and {shares[1]} of "
        f"{card.bandwidth:,g} GB/s",
        f"({card.source}), and {SHARE_OF_FLOOR * 100:.0f} % of that: what an H100 reached; but at most",
        f"{MOST_OF_PUBLISHED * 100:.0f} % of the published operations, as in the best row measured. {NOT_MEASURED}",
    ]
    name = next((key for key, each in CARDS.items() if each == card), "")
    shown = {fit.model for fit in fits}
    rows = [
        each
        for each in MEASURED_SPEEDS
        if each.card == name and each.model in shown and each.peak_gb * 1e9 <= fits[0].budget
    ]
    if not rows:
        return lines
    lines.append(f"Measured on this card within that memory ({SOURCE}; sequences of 256, updates in a row):")
    for each in rows:
        again = {0: "nothing recomputed", 1: "all recomputed"}.get(
            each.checkpoint_every, f"1 in {each.checkpoint_every} recomputed"
        )
        lines.append(
            f"  {each.model.upper()}: {each.tokens_per_second:,} tokens/s, {each.peak_gb:.2f} GB, "
            f"{each.gradient_accumulation} x {each.batch_size}, rank {each.rank}, {again}"
            f"{', INT8 activations' if each.int8_activations else ''} ({each.commit})"
        )
    return lines


def overview(pairs: Sequence[tuple[int, Card]], models: Sequence[str], flags: Sequence[str]) -> str:
    """Several memories with a card each: a column a memory, a row a model. Raises UserError."""
    runs = {name: ShippedRun(name, flags) for name in models}
    ranks = next(iter(runs.values())).candidates.smallest.args.world_size
    rows = [["model", *(f"{budget / 1e9:g} GB, {_cards(card, ranks)}" for budget, card in pairs)]]
    for name, run in runs.items():
        rows.append([name.upper(), *(_cell(run.fit(budget, card)) for budget, card in pairs)])
    return "\n".join(
        [
            text_table(rows),
            "",
            "A cell: sequences of a micro-batch; what is recomputed (R: all layers, R3: the first 3, or tensors, as",
            "--recompute has them); what is rounded to INT8 (a: activations, s: sums over micro-batches); the rank,",
            "where it is below the recipe's; tokens/s, with * where measured; days of as many tokens as the paper's",
            "run; or the least memory that the model trains in.",
            "Speeds are counted from a card's published rates and what an H100 reaches of its own, with at most "
            f"{MOST_OF_PUBLISHED * 100:.0f} % of the",
            f"published operations, as in the best row measured. {NOT_MEASURED}",
        ]
    )


def _cell(fit: Fit) -> str:
    if fit.chosen is None:
        return f"from {_gigabytes(fit)} GB"
    args, given = fit.chosen.args, ""
    if args.model.activation_checkpointing:
        given += f" R{args.model.checkpoint_layers or ''}"
    given += f" R({args.model.recompute})" if args.model.recompute else ""
    sums = args.optimizer.grad_accum_dtype == "int8" and args.batch.gradient_accumulation > 1
    given += " " + "a" * args.model.int8_activations + "s" * sums if args.model.int8_activations or sums else ""
    rank = f", rank {args.subspace.rank}" if "--rank" in fit.chosen.flags else ""
    days = "" if fit.days is None else f", {days_in_words(fit.days)} d"
    return f"{args.batch.batch_size}{given}{rank}: {fit.tokens_per_second:,.0f}{'*' if fit.row else ''}{days}"
