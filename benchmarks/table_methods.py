"""The methods of the papers' tables as flags of `run_pretrain.py`: recipes by size, learning rates, ablations, lengths.

Sources: Q-GaLore (arXiv 2407.08296) with its official scripts; GaLore (arXiv 2403.03507) with its own, from whose
comparison LoRA and ReLoRA have alpha 32 and dropout 0.05; ReLoRA (arXiv 2307.05695), which merges every quarter of a
run. For full rank, low rank and adapters GaLore's paper says that the rate was the best of 0.01, 0.005, 0.001, 0.0005
and 0.0001 for each and not which it was: 0.001 up to 130M and 0.0005 beyond stand here for all of them, and `--tuned`
tries others. Muon and the two of this project's own have the values of `docs/quality.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.models import LENGTH, RANKS, config, config_path
from benchmarks.quality import SETTINGS
from peft_pretraining.config.flags import parse_count
from peft_pretraining.errors import UserError

SEQUENCES = 512
"""Of an update, in the papers."""
FACTORS = (1.0, 0.5, 2.0)
"""The multiples of a method's learning rates that `--tuned` tries."""


@dataclass(frozen=True)
class Recipe:
    """What the papers set for a size of model."""

    updates: int
    """Of `SEQUENCES` sequences."""
    rank: int
    interval: int = 200
    """Updates between two refreshes of a subspace."""
    q_galore_lr: float = 0.015
    galore_lr: float = 0.01
    full_rank_lr: float = 0.001
    """Of methods without subspaces."""
    large: bool = False
    """8-bit states and updates inside the backward pass, with recomputed activations."""
    reported_at: int = 0
    """The update whose perplexity the paper's table has; 0: the last one."""


RECIPES: Mapping[str, Recipe] = {
    "60m": Recipe(10_000, 128),
    "130m": Recipe(20_000, 256),
    "350m": Recipe(60_000, 256, q_galore_lr=0.01, full_rank_lr=0.0005),
    "1b": Recipe(100_000, 512, q_galore_lr=0.01, full_rank_lr=0.0005),
    "7b": Recipe(
        150_000, 1024, 500, q_galore_lr=0.004, galore_lr=0.005, full_rank_lr=0.0005, large=True, reported_at=40_000
    ),
}
SHORT_TOKENS: Mapping[str, int] = {
    "60m": 10_000 * SEQUENCES * LENGTH,
    "130m": 2_280_000_000,
    "350m": 820_000_000,
    "1b": 230_000_000,
    "7b": 40_000_000,
}
"""What an H100 trains in an hour by Q-GaLore's tokens a second in `benchmarks/results/compare.csv`, or the paper's
whole run where that is less: 60M."""


def recipe_of(model: str) -> Recipe:
    """The recipe of a model by its config's name; one that no paper has gets 60M's rates and a quarter of its width.

    Raises UserError if there is no such config.
    """
    if model in RECIPES:
        return RECIPES[model]
    if not config_path(model).is_file():
        known = sorted(path.stem.removeprefix("llama_") for path in config_path("60m").parent.glob("llama_*.json"))
        raise UserError(f"--models {model}: there is no such config; there are {', '.join(known)}")
    return Recipe(10_000, RANKS.get(model) or config(model).hidden_size // 4)


class Budget(NamedTuple):
    """The length of runs, as `--budget` gives it."""

    text: str

    def updates(self, model: str, sequences: int) -> int:
        """The updates of so many sequences; raises UserError for a text or a model without a length."""
        kind, _, number = self.text.partition(":")
        try:
            if kind == "updates" and (updates := parse_count(number)) > 0:
                return updates
            if kind == "tokens" and (tokens := parse_count(number)) > 0:
                return -(-tokens // (sequences * LENGTH))
        except ValueError as error:
            raise UserError(f"--budget {self.text}: the number behind the colon must be {error}") from None
        if self.text not in ("paper", "short"):
            raise UserError(
                f"--budget {self.text}: give paper, short, a number of tokens such as tokens:52M, or one of updates "
                "such as updates:800"
            )
        if model not in RECIPES:
            raise UserError(
                f"--budget {self.text}: the papers have no run of {model}, only of {', '.join(RECIPES)}; give a length "
                "such as tokens:52M"
            )
        tokens = RECIPES[model].updates * SEQUENCES * LENGTH if self.text == "paper" else SHORT_TOKENS[model]
        return -(-tokens // (sequences * LENGTH))


# ---- methods

Rates = Mapping[str, float]
"""Learning rates by flag."""


class Method(NamedTuple):
    """A row of a table."""

    label: str
    rates: Callable[[Recipe], Rates]
    flags: Callable[[Recipe, int], list[str]]
    """The other flags, for a number of updates."""
    same_as: str = ""
    """The method that this one is a variant of."""


def flags_of(method: str, recipe: Recipe, updates: int, factor: float = 1.0) -> list[str]:
    """The flags of a method of `METHODS` or `ABLATION`, with `factor` times its learning rates."""
    found = {**METHODS, **ABLATION}[method]
    rates = [word for flag, rate in found.rates(recipe).items() for word in (flag, f"{factor * rate:.6g}")]
    return [*found.flags(recipe, updates), *rates]


def _full_rank_rate(recipe: Recipe) -> Rates:
    return {"--lr": recipe.full_rank_lr}


def _own_rate(recipe: Recipe) -> Rates:
    return {"--lr": 0.01}


def _full(recipe: Recipe, updates: int) -> list[str]:
    # Our kernels round bfloat16 weights stochastically, as those of adamw do, and bitsandbytes' to the nearest.
    adam = ["adam8bit", "--adam8bit_backend", "own"] if recipe.large else ["adamw"]
    return ["--optimizer", *adam, "--weight_decay", "0"]


def _low_rank(recipe: Recipe, updates: int) -> list[str]:
    return [*_full(recipe, updates), "--method", "low_rank", "--rank", str(recipe.rank)]


def _adapters(method: str) -> Callable[[Recipe, int], list[str]]:
    def flags(recipe: Recipe, updates: int) -> list[str]:
        every = max(2, updates // 4)
        own = {
            "qlora": ["--qlora_bits", "4"],
            "relora": ["--relora_every", str(every), "--relora_warmup", str(min(50, every // 10))],
        }
        rank = ["--rank", str(recipe.rank), "--lora_alpha", "32", "--lora_dropout", "0.05"]
        return [*_full(recipe, updates), "--method", method, *rank, *own.get(method, [])]

    return flags


def _subspace(recipe: Recipe) -> list[str]:
    interval = ["--update_proj_gap", str(recipe.interval)]
    return ["--weight_decay", "0", "--rank", str(recipe.rank), "--galore_scale", "0.25", *interval]


def _galore(recipe: Recipe, updates: int) -> list[str]:
    name = "galore_adamw8bit_per_layer" if recipe.large else "galore_adamw"
    return ["--optimizer", name, *_subspace(recipe), "--gamma_proj", "1"]


def _q_galore(recipe: Recipe, updates: int) -> list[str]:
    name = "q_galore_adamw8bit" + ("_per_layer" if recipe.large else "")
    lazy = ["--cos_threshold", "0.4", "--gamma_proj", "2", "--queue_size", "5"]
    return ["--optimizer", name, "--recipe", "paper", *_subspace(recipe), *lazy]


def _muon(recipe: Recipe, updates: int) -> list[str]:
    # Tuned over 800 updates; over more, the same decay from the first to the last.
    decay = min(1.0, 800 / updates)
    flags = ["--optimizer", "muon", "--grad_clipping", "1"]
    return [*flags, "--weight_decay", f"{decay:.4g}", "--full_rank_weight_decay", "0"]


METHODS: Mapping[str, Method] = {
    "full": Method("Full (AdamW)", _full_rank_rate, _full),
    "low_rank": Method("Low-Rank (W = BA)", _full_rank_rate, _low_rank),
    "lora": Method("LoRA", _full_rank_rate, _adapters("lora")),
    "relora": Method("ReLoRA", _full_rank_rate, _adapters("relora")),
    "qlora": Method("QLoRA (NF4)", _full_rank_rate, _adapters("qlora")),
    "galore": Method("GaLore", lambda recipe: {"--lr": recipe.galore_lr}, _galore),
    "q_galore": Method("Q-GaLore (the paper's)", lambda recipe: {"--lr": recipe.q_galore_lr}, _q_galore),
    "muon": Method("Muon", lambda recipe: {"--lr": 4e-3, "--full_rank_lr": 4e-2}, _muon),
    "recipe": Method("`--recipe orthogonal`", _own_rate, lambda *_: SETTINGS["q_galore_recipe_per_layer"]),
    "full_rank": Method("`--recipe full_rank`, the default", _own_rate, lambda *_: SETTINGS["full_rank_recipe"]),
}


# ---- ablations of Q-GaLore


def _variant(label: str, change: Callable[[Recipe, int], list[str]]) -> Method:
    def flags(recipe: Recipe, updates: int) -> list[str]:
        return [*_q_galore(recipe, updates), *change(recipe, updates)]

    return Method(label, METHODS["q_galore"].rates, flags, "q_galore")


def _lazy(*flags: str) -> Callable[[Recipe, int], list[str]]:
    """With 50 intervals in a run, as in the paper's of 60M: at 200 updates a short run has too few for the rule."""
    return lambda recipe, updates: ["--update_proj_gap", str(max(1, updates // 50)), *flags]


def _of_rank(share: float) -> Callable[[Recipe, int], list[str]]:
    return lambda recipe, updates: ["--rank", str(max(1, round(share * recipe.rank)))]


ABLATION: Mapping[str, Method] = {
    "nearest_rounding": _variant("weights rounded to the nearest", lambda *_: ["--no-stochastic_round"]),
    "float_projection": _variant("projections in floats", lambda *_: ["--no-proj_quant"]),
    "int8_projection": _variant("projections in INT8", lambda *_: ["--proj_bits", "8"]),
    "lazy_off": _variant("50 refreshes, none left out", _lazy("--gamma_proj", "1")),
    **{
        f"lazy_{threshold}": _variant(f"50 refreshes, threshold {threshold}", _lazy("--cos_threshold", threshold))
        for threshold in ("0.2", "0.4", "0.6", "0.8")
    },
    "rank_quarter": _variant("a quarter of the rank", _of_rank(0.25)),
    "rank_half": _variant("half the rank", _of_rank(0.5)),
    "rank_double": _variant("twice the rank", _of_rank(2)),
    **{
        f"interval_{interval}": _variant(f"a refresh every {interval} updates", lambda *_, i=interval: _every(i))
        for interval in (50, 100, 500)
    },
}


def _every(interval: int) -> list[str]:
    return ["--update_proj_gap", str(interval)]
