"""Plan runs without a GPU: what trains in the memory of a card, how, and how fast.

    qgalore plan --gpu 4090                        # every shipped model: micro-batch, recomputation, tokens/s, days
    qgalore plan --memory 12GB --model 1b,7b       # in 12 GB (10^9 bytes) of a card of about that memory
    qgalore plan --memory 12GB --max_length 1024   # flags of run_pretrain.py in place of the recipe's
    qgalore plan --memory 8GB,24GB                 # several memories side by side
    qgalore plan --model_config FILE ...           # flags of a run: what --dry_run prints
    qgalore plan --cards                           # the cards, with the sources of their figures

The recipe is the paper's with the streaming subspace: INT8 weights, INT4 projections, 8-bit states, updates of 512
sequences of 256 tokens. What is chosen is what --memory_budget chooses for run_pretrain.py.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from peft_pretraining.config.flag_groups import FULL_RANK_OPTIMIZERS
from peft_pretraining.config.flags import flag_values, is_given, parse_size
from peft_pretraining.errors import UserError
from peft_pretraining.models.config_files import shipped_config, shipped_configs
from peft_pretraining.speed.cards import Card, card_of_size, find_card, table_of_cards
from qgalore.update.newton_schulz import AUTO, asks_for_fp8


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what this command does not know is a run's flag."""
    parser = argparse.ArgumentParser(
        prog="qgalore plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="qgalore plan [--memory SIZE] [--gpu NAME] [--model NAMES] [flags of run_pretrain.py]",
        allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--memory", default="", metavar="SIZE", help="such as 12GB or 11.5GiB, or several by commas")
    parser.add_argument("--gpu", default="", metavar="NAME", help="whose speed is counted, such as 4060ti or h100")
    parser.add_argument("--model", default="", metavar="NAMES", help="of shipped models, by commas (default: all)")
    parser.add_argument("--cards", action="store_true", help="print the table of cards")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        flag, _, metavar = (error.argument_name or "").partition(" ")
        if flag == "--cards":  # as in --cards=all
            raise UserError("--cards prints the table of all cards: write --cards alone") from None
        values = {"--memory": "SIZE", "--gpu": "NAME", "--model": "NAMES"}
        raise UserError(f"{flag} has no value: write {flag} {metavar or values.get(flag, '')}".rstrip()) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns 0, or 2 for a UserError."""
    try:
        print(text_of(*parse_args(argv)))
    except UserError as error:
        print(f"qgalore plan: {error}", file=sys.stderr)
        return 2
    return 0


def text_of(args: argparse.Namespace, flags: list[str]) -> str:
    """What the command prints; flags: of a run. Raises UserError."""
    if args.cards:
        given = {"--memory": args.memory, "--gpu": args.gpu, "--model": args.model}
        if others := [*(flag for flag, value in given.items() if value), *flags]:
            raise UserError(f"{others[0]}: --cards prints the table of all cards, and takes nothing: leave it out")
        return table_of_cards()
    flags = checked(args, flags)
    budgets = [_bytes(text.strip()) for text in args.memory.split(",") if text.strip()]
    card = find_card(args.gpu) if args.gpu else None
    if card and max(budgets, default=0) > card.bytes:
        raise UserError(
            f"--memory {args.memory} is more than the {card.gigabytes} GB of {card.name}: give at most that, or leave "
            "--gpu out"
        )
    if card and not card.fp8 and (asked := _asks_for_fp8(flags)):
        raise UserError(_no_fp8(args, card, f"leave {asked} out", asked))
    if is_given(flags, "model_config"):
        return _describe(args, flags, card.gigabytes if card else 0)
    if card is not None and not budgets:
        budgets = [card.bytes]
    if not budgets:
        unknown = f" ({flags[0]} is no flag of this command)" if flags else ""
        raise UserError(
            f"give --memory, such as --memory 12GB, or --gpu, such as --gpu 4090, for what trains there{unknown}; or "
            "the flags of a run with its --model_config, for what --dry_run prints of it"
        )
    models = model_names(args.model)
    too_short = [] if args.model else _of_shorter_context(models, flags)
    models = [name for name in models if name not in too_short] or models
    from peft_pretraining.memory import fit_tables

    if len(budgets) == 1:
        table = fit_tables.details(budgets[0], card or card_of_size(budgets[0]), models, flags)
    else:
        table = fit_tables.overview([(each, card or card_of_size(each)) for each in budgets], models, flags)
    if not too_short:
        return table
    return (
        f"{table}\n\nLeft out, as --max_length is longer than their max_position_embeddings: "
        f"{', '.join(too_short)}. For one of them\ngive --model_config with a copy of its file that has more, and the "
        "other flags of the run."
    )


def _of_shorter_context(models: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Of shipped models those whose context is shorter than the --max_length of a run."""
    from peft_pretraining.models.registry import read_config

    length = next((int(text) for flag, text in flag_values(flags) if flag == "--max_length" and text.isdecimal()), 0)
    paths = shipped_configs()
    return [name for name in models if read_config(paths[name]).max_position_embeddings < length]


def checked(args: argparse.Namespace, flags: list[str]) -> list[str]:
    """The flags of a run with what a plan of several ranks needs; raises UserError for those that mean nothing here."""
    shipped = not is_given(flags, "model_config")
    if is_given(flags, "memory_budget") and (args.memory or (shipped and args.gpu)):
        raise UserError("--memory_budget is the budget of a run, which --memory or --gpu gives here: leave it out")
    if shipped and is_given(flags, "device", "cpu"):
        raise UserError("--device cpu: what a card trains is planned with --gpu and --memory: leave one of them out")
    ranks = is_given(flags, "nproc")
    one = not ranks or is_given(flags, "nproc", "1")
    if shipped and one and any(is_given(flags, "shard", mode) for mode in ("optimizer", "full")):
        raise UserError("--shard deals a model to several ranks, and one is planned: give --nproc, such as --nproc 2")
    return [*flags, "--dry_run"] if ranks and not is_given(flags, "dry_run") else flags


def _no_fp8(args: argparse.Namespace, card: Card, instead: str, asked: str) -> str:
    return (
        f"{asked} on --gpu {args.gpu}: {card.name} has no products in FP8, which need compute capability 8.9 (RTX 40, "
        f"L4, H100 and newer): {instead}"
    )


def _asks_for_fp8(flags: list[str]) -> str:
    """The flag of a run that makes products in FP8 on every card; "" without one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--fp8_products", action="store_true")
    parser.add_argument("--newton_schulz", default=AUTO)
    parser.add_argument("--optimizer", type=str.lower, default="")
    with contextlib.suppress(argparse.ArgumentError):  # which the run's own parser says
        known = parser.parse_known_args(flags)[0]
        if known.fp8_products:
            return "--fp8_products"
        orthogonalises = known.optimizer not in FULL_RANK_OPTIMIZERS
        if orthogonalises and asks_for_fp8(known.newton_schulz):
            return f"--newton_schulz {known.newton_schulz}"
    return ""


def model_names(text: str) -> list[str]:
    """Shipped models of a list such as 60m,7B; all for an empty text. Raises UserError for others."""
    sizes = {path: size for size, path in shipped_configs().items()}
    found = []
    for name in filter(None, (each.strip() for each in text.split(","))):
        path = shipped_config(name)
        if path is None:
            raise UserError(
                f"--model {name} is none of the shipped models, which are {', '.join(sizes.values())}; for a "
                "configuration of your own give --model_config FILE and the other flags of the run"
            )
        found.append(sizes[path])
    return found or list(sizes.values())


def _describe(args: argparse.Namespace, flags: list[str], gigabytes: int) -> str:
    """What `--dry_run` prints of a run, with --memory as its budget, or else a card's for a batch that is not given."""
    from peft_pretraining.dry_run import describe
    from peft_pretraining.memory.budget import parse_within_budget
    from peft_pretraining.runtime.rendezvous import world_size_of_launch

    if args.model or "," in args.memory:
        flag = f"--model {args.model}" if args.model else f"--memory {args.memory}"
        raise UserError(f"{flag} is for shipped models, and --model_config names one run: leave one of them out")
    budget = args.memory
    # Planned for that card, whatever this machine has.
    card = find_card(args.gpu) if args.gpu else card_of_size(_bytes(budget)) if budget else None
    if card and not budget and not is_given(flags, "batch_size") and not is_given(flags, "memory_budget"):
        budget = f"{gigabytes}GB"
    flags = [*flags, *(["--memory_budget", budget] if budget else [])]
    run = parse_within_budget(flags, world_size_of_launch(), card)
    if args.gpu and card and not card.fp8 and asks_for_fp8(run.newton_schulz):
        steps = f"--newton_schulz {run.newton_schulz}, as in the checkpoint,"
        raise UserError(_no_fp8(args, card, "go on with it on another card", steps))
    return describe(run, card)


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"--memory is {text!r}, it must be {error}") from None
