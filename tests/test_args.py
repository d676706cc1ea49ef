"""The command line: frozen, complete, and clear about what is wrong with it.

Renew the frozen list with `python -m tests.test_args > tests/golden/command_line.txt`.
"""

import dataclasses
import re
from argparse import ArgumentTypeError
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest

from peft_pretraining import commands
from peft_pretraining.commands import evaluate, export, generate, plot, report, tokenize
from peft_pretraining.config import tried_names
from peft_pretraining.config.flags import (
    FlagSpec,
    format_count,
    parse_count,
    parse_whole,
    read_specs,
    whole_number,
)
from peft_pretraining.config.named_method import with_old_values
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import GROUPS, RunArgs
from peft_pretraining.config.tried_names import ADVICE, RENAMED, flags_in_advice, what_is_right
from peft_pretraining.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "command_line.txt"
CONFIG = str(Path(__file__).parent.parent / "configs" / "llama_60m.json")
REQUIRED = ["--model_config", CONFIG, "--batch_size", "8"]

# The flags of the official run_pretrain.py, with what they are when they are left out.
OFFICIAL_DEFAULTS = {
    "use_hf_model": False,
    "continue_from": "",
    "gradient_accumulation": 1,
    "total_batch_size": 8,
    "max_length": 256,
    "optimizer": "adam",
    "lr": 1e-4,
    "scheduler": "cosine",
    "min_lr_ratio": 0.1,
    "activation_checkpointing": False,
    "weight_decay": 0.0,
    "warmup_steps": 1000,
    "eval_every": 5000,
    "num_training_steps": 10000,
    "max_train_tokens": 0,
    "save_every": 10000,
    "save_dir": "",
    "tags": "",
    "name": "test",
    "dtype": "bfloat16",
    "workers": 8,
    "seed": 0,
    "project": "test",
    "unset_wandb": False,
    "grad_clipping": 0.0,
    "beta1": 0.0,
    "beta2": 0.95,
    "rank": 128,
    "update_proj_gap": 50,
    "galore_scale": 1.0,
    "proj_type": "std",
    "proj_quant": False,
    "proj_bits": 4,
    "proj_group_size": 256,
    "weight_quant": False,
    "weight_bits": 8,
    "weight_group_size": 256,
    "stochastic_round": False,
    "simulation": False,
    "cos_threshold": 0.4,
    "gamma_proj": 2,
    "queue_size": 5,
    "single_gpu": False,
}
OPTIMIZERS = [
    "Adam",
    "adamw",
    "sgd",
    "muon",
    "adafactor",
    "adam8bit",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_adamw8bit_per_layer",
    "q_galore_adamw8bit",
    "q_galore_adamw8bit_per_layer",
]


def specs() -> list[FlagSpec]:
    return [spec for group in GROUPS.values() for spec in read_specs(group)]


def command_line() -> str:
    """One line a flag: group, name, type, choices, default, and the --no- form of a switch that has one."""
    lines = []
    for title, group in GROUPS.items():
        for spec in read_specs(group):
            kind = spec.kind.__name__ + (" or none" if spec.optional else "")
            choices = f" {{{','.join(map(str, spec.flag.choices))}}}" if spec.flag.choices else ""
            unit = f" [{spec.flag.unit}]" if spec.flag.unit else ""
            default = "required" if spec.default is dataclasses.MISSING else repr(spec.default)
            default += f", --no-{spec.name}" if spec.can_be_denied else ""
            lines.append(f"{title}: --{spec.name} {kind}{choices}{unit} = {default}")
    return "\n".join(lines) + "\n"


def parse(text: str = "", world_size: int = 1) -> RunArgs:
    return parse_args([*REQUIRED, *text.split()], world_size)


def refusal(argv: list[str], world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv, world_size)
    return str(caught.value)


def test_command_line_is_frozen() -> None:
    assert command_line() == GOLDEN.read_text(encoding="utf-8")


def test_every_flag_of_the_official_code_keeps_its_default() -> None:
    values = parse().to_dict()
    assert len(OFFICIAL_DEFAULTS) + len(("model_config", "batch_size")) == 45
    assert {name: values[name] for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS


def test_flag_names_are_unique_and_help_gives_unit_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    names = [spec.name for spec in specs()]
    assert len(names) == len(set(names))
    for spec in specs():
        assert spec.is_switch or spec.flag.choices or spec.flag.unit, f"--{spec.name} has no unit"
        assert len(spec.help) > 15 and spec.help.endswith("."), f"--{spec.name}: {spec.help!r}"
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for title in GROUPS:
        assert f"{title}:" in text
    for spec in specs():
        assert re.search(rf"--{spec.name}\b", text)
        # What is on, or left to others to decide, can be switched off.
        left_to_others = spec.default is not False or bool(spec.flag.auto)
        assert (f"--no-{spec.name} " in text) == (spec.is_switch and left_to_others)
        assert f"{spec.help} ({spec.default_text})" in text


@pytest.mark.parametrize(
    ("text", "added"),
    [("", (None, True)), ("--no-add_eos", (None, False)), ("--no-add_eos --add_eos --add_bos", (True, True)),
     ("--no-add_bos", (False, True))],
)  # fmt: skip
def test_switches_that_are_on_can_be_switched_off(text: str, added: tuple[bool | None, bool]) -> None:
    data = parse(text).data
    assert (data.add_bos, data.add_eos) == added


NAMED = ("weight_quant", "stochastic_round", "proj_quant")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", (True, True, False)),
        ("--no-weight_quant", (False, False, False)),
        ("--no-stochastic_round", (True, False, False)),
        ("--recipe orthogonal", (True, True, True)),
        ("--rank 64", (True, True, True)),
        ("--no-stochastic_round --rank 64", (True, False, True)),
        ("--weight_quant --no-proj_quant", (True, True, False)),
        ("--rank full", (True, True, False)),
        ("--rank full --mlp_rank full", (True, True, False)),
        ("--rank full --mlp_rank 64", (True, True, True)),
        ("--simulation --recipe paper", (True, True, True)),
    ],
)
def test_the_name_of_a_q_galore_optimizer_is_the_method(text: str, values: tuple[bool, bool, bool]) -> None:
    """INT8 weights with stochastic rounding, and INT4 projections where there are any, unless told otherwise.

    Others keep their defaults.
    """
    for name in ("q_galore_adamw8bit", "Q_GaLore_AdamW8bit_per_layer"):
        args = parse(f"--optimizer {name} {text}")
        assert tuple(args.to_dict()[flag] for flag in NAMED) == values
        assert (args.quantization.weight_format.bits, args.subspace.config(of_mlp=True).basis_bits) == (
            8 if values[0] else None, 4 if values[2] else None,
        )  # fmt: skip
        assert set(args.left_to_name) == {flag for flag in ("recipe", "newton_schulz", *NAMED) if f"{flag}" not in text}
    for name in OPTIMIZERS:
        if not name.startswith("q_galore"):
            args = parse(f"--optimizer {name}")
            assert [args.to_dict()[flag] for flag in NAMED] == [False] * 3
            others = ("newton_schulz",) if name.startswith("galore") else ()
            assert args.left_to_name == (("adam8bit_backend",) if name == "adam8bit" else others)


def test_a_run_that_goes_on_keeps_what_its_checkpoint_says_of_the_method(tmp_path: Path) -> None:
    """Before checks and plan, and where no flag is given: from the newest checkpoint whose state can be read."""
    state = '{"weight_quant": false, "stochastic_round": false, "lr": 1, "recipe": "orthogonal"}'
    for step, text in ((3, state), (4, "[]"), (5, "{")):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "state.json").write_text(text)
        (folder / "manifest.json").write_text("{}")
    auto = f"{Q_GALORE} --save_dir {tmp_path} --continue_from auto"
    for text in (auto, f"{Q_GALORE} --continue_from {tmp_path / 'step_00000003'}"):
        args = parse(text)
        assert [args.to_dict()[name] for name in NAMED] == [False, False, True] and args.optimizer.lr == 0.01
        assert args.optimizer.recipe == "orthogonal" and args.subspace.projects
        assert args.notes == ("--no-weight_quant --no-stochastic_round --recipe orthogonal, as in the checkpoint: the "
                              "command line says nothing of it",)  # fmt: skip
    assert parse(f"{auto} --weight_quant --stochastic_round --recipe orthogonal").notes == ()
    assert parse(f"{auto} --weight_quant --stochastic_round --rank 32").notes == (), "which that recipe is for"
    assert parse(f"{auto} --galore_scale 0.25").notes == args.notes, "and no word of another recipe"
    with pytest.raises(UserError, match=r"--int8_products .*\(--no-weight_quant .*, as in the checkpoint"):
        parse(f"{auto} --int8_products")
    assert parse(f"{Q_GALORE} --save_dir {tmp_path / 'none'} --continue_from auto").notes == ()


@pytest.mark.parametrize("optimizer", ["q_galore_adamw8bit", "galore_adamw", "galore_adamw8bit_per_layer"])
def test_a_run_that_goes_on_keeps_its_newton_schulz_steps(optimizer: str, tmp_path: Path) -> None:
    """Of --recipe full_rank they are auto, and were Muon's before: a checkpoint without the flag has those."""
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    of_recipe = f"--optimizer {optimizer} --recipe full_rank"
    resumed = f"{of_recipe} --continue_from {folder}"
    said = "--newton_schulz {}, as in the checkpoint: the command line says nothing of it"
    for recorded, steps in (
        ("", "muon"),
        (', "newton_schulz": "polar4"', "polar4"),
        (', "newton_schulz": "auto"', "auto"),
    ):
        (folder / "state.json").write_text(f'{{"optimizer": "{optimizer}", "recipe": "full_rank"{recorded}}}')
        args = parse(resumed)
        assert args.newton_schulz == steps and args.notes == (() if steps == "auto" else (said.format(steps),))
        assert parse(f"{resumed} --newton_schulz polar5").newton_schulz == "polar5"
    assert parse(of_recipe).newton_schulz == "auto"
    assert parse(of_recipe.replace("full_rank", "paper")).newton_schulz == "muon"
    assert parse(Q_GALORE).newton_schulz == "auto", "the default"


@pytest.mark.parametrize(
    ("state", "recipe"),
    [
        ({"recipe": "orthogonal"}, "orthogonal"),
        ({"recipe": "", "direction": "orthogonal"}, "orthogonal"),
        ({"direction": "normuon"}, "full_rank"),
        ({"direction": "adam"}, "paper"),
    ],
)
def test_the_recipe_of_an_old_checkpoint(state: dict[str, str], recipe: str) -> None:
    assert with_old_values({"optimizer": "q_galore_adamw8bit", **state})["recipe"] == recipe


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--sum_in_momentum --galore_scale 0.25", r"\(recipe paper, because of --galore_scale 0.25\)"),
        ("--momentum_rank 16 --update_proj_gap 100", r"\(recipe orthogonal, because of --update_proj_gap 100\)"),
    ],
)
def test_a_refusal_says_which_flag_has_chosen_the_recipe(flags: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse(f"{Q_GALORE} {flags}")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_names_in_any_case(name: str) -> None:
    assert parse(f"--optimizer {name}").optimizer.optimizer == name.lower()
    assert parse(f"--optimizer {name.upper()}").optimizer.optimizer == name.lower()


def test_optimizer_kinds() -> None:
    kinds = {name.lower(): parse(f"--optimizer {name}").optimizer for name in OPTIMIZERS}
    assert [name for name, args in kinds.items() if args.is_low_rank] == [name for name in kinds if "galore" in name]
    assert [name for name, args in kinds.items() if args.is_q_galore] == [name for name in kinds if name[0] == "q"]
    assert [name for name, args in kinds.items() if args.per_layer] == [name for name in kinds if "layer" in name]


def test_beta1_of_zero_is_the_usual_momentum() -> None:
    assert parse().optimizer.adam_beta1 == 0.9
    assert parse("--beta1 0.8").optimizer.adam_beta1 == 0.8


def test_full_rank_lr_defaults_to_lr() -> None:
    assert parse("--lr 0.02").optimizer.peak_full_rank_lr == 0.02
    assert parse("--lr 0.02 --full_rank_lr 0").optimizer.peak_full_rank_lr == 0


def test_full_rank_weight_decay_defaults_to_weight_decay() -> None:
    assert parse("--weight_decay 0.1").optimizer.decay_of_full_rank == 0.1
    assert parse("--weight_decay 0.1 --full_rank_weight_decay 0").optimizer.decay_of_full_rank == 0


def test_moments_rotate_by_default_only_when_streaming() -> None:
    galore = "--optimizer galore_adamw"
    assert not parse(galore).subspace.rotates_moments
    assert parse(f"{galore} --rotate_moments").subspace.rotates_moments
    assert parse(f"{galore} --subspace streaming").subspace.rotates_moments
    assert not parse(f"{galore} --subspace streaming --no-rotate_moments").subspace.rotates_moments


@pytest.mark.parametrize(
    ("text", "world_size", "expected"),
    [
        ("", 1, (1, 8)),
        ("", 4, (1, 32)),
        ("--gradient_accumulation 3", 2, (3, 48)),
        ("--total_batch_size 512", 1, (64, 512)),
        ("--total_batch_size 512", 8, (8, 512)),
        ("--total_batch_size 64 --gradient_accumulation 4", 2, (4, 64)),
    ],
)
def test_total_batch_is_honoured(text: str, world_size: int, expected: tuple[int, int]) -> None:
    batch = parse(text, world_size).batch
    assert (batch.gradient_accumulation, batch.total_batch_size) == expected


@pytest.mark.parametrize(
    ("text", "updates"),
    [("5000", 3), ("4096", 2), ("4097", 3), ("1M", 489), ("1.1B", 537110), ("0.5k", 1), ("2048", 1)],
)
def test_max_train_tokens_counts_tokens_and_rounds_up(text: str, updates: int) -> None:
    args = parse(f"--max_train_tokens {text} --num_training_steps 7 --warmup_steps 0")
    assert args.tokens_per_update == 8 * 256
    assert args.schedule.num_training_steps == updates
    assert any("--max_train_tokens replaces --num_training_steps" in warning for warning in args.warnings)


def test_counts_read_back() -> None:
    for count in (1, 999, 1000, 1500, 10_000_000, 13_100_000_000):
        assert parse_count(format_count(count)) == count
    assert parse_count("100m") == 100_000_000
    assert parse_count("1_000") == parse_count("1e3") == parse_count("1E+3") == 1000
    assert parse_count("1.1e9") == parse_count("1.1B") == 1_100_000_000


@pytest.mark.parametrize("text", ["1e3", "1000", "1_000", "1.0e3", "1E3", "1000.0", "0.1e4", "10e+2"])
def test_a_whole_number_in_any_notation(text: str) -> None:
    args = parse(f"--num_training_steps {text} --rank {text} --eval_tokens {text} --seed {text} --decay_steps {text}")
    schedule, numbers = args.schedule, (args.subspace.rank, args.evaluation.eval_tokens, args.runtime.seed)
    assert (schedule.num_training_steps, schedule.decay_steps, *numbers) == (1000,) * 5
    assert all(type(number) is int for number in (schedule.num_training_steps, schedule.decay_steps, *numbers))
    assert whole_number(text) == 1000


def test_a_number_for_a_command_is_whole() -> None:
    assert parse_whole("1.5e3") == 1500 and parse_whole(" -7 ") == -7 and parse_whole(str(10**30)) == 10**30
    with pytest.raises(ArgumentTypeError, match=r"'1.5', it must be a whole number"):
        whole_number("1.5")


def test_no_command_reads_whole_numbers_by_int() -> None:
    """It would refuse 1e3; `config.flags.whole_number` is the type for argparse."""
    folder = Path(commands.__file__).parent
    assert [path.name for path in sorted(folder.glob("*.py")) if "type=int" in path.read_text(encoding="utf-8")] == []


def test_derived_defaults() -> None:
    args = parse("--update_proj_gap 30")
    assert args.subspace.max_update_proj_gap == 240
    assert args.evaluation.eval_batch_size == 8
    assert args.evaluation.eval_tokens == 10_000_000
    assert parse("--unset_wandb").logging.resolved_wandb_mode == "off"
    assert parse("--tags a,b,,c").logging.tag_list == ["a", "b", "c"]
    assert parse("--dtype bf16").model.dtype == "bfloat16"


def test_save_dir(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    assert parse().save_dir(now) == Path("checkpoints/llama_60m-adam-20260102-030405")
    assert parse("--save_dir out").save_dir(now) == Path("out")
    checkpoint = tmp_path / "step_00000010"
    checkpoint.mkdir()
    assert parse(f"--continue_from {checkpoint}").save_dir(now) == tmp_path
    assert parse(f"--continue_from {tmp_path}").save_dir(now) == tmp_path


def test_later_flags_win_and_values_may_be_glued_on() -> None:
    args = parse("--lr 0.1 --lr=0.2 --beta1=0.5")
    assert (args.optimizer.lr, args.optimizer.beta1) == (0.2, 0.5)


def test_every_value_survives_in_the_dictionary() -> None:
    assert set(parse().to_dict()) == {spec.name for spec in specs()}


# Official scripts pass these together, so they must go on working.
@pytest.mark.parametrize(
    "text",
    [
        "--optimizer q_galore_adamw8bit --weight_quant --stochastic_round --simulation --proj_quant",
        "--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant --single_gpu "
        "--activation_checkpointing --grad_clipping 1.0 --total_batch_size 512",
        "--optimizer q_galore_adamw8bit --weight_quant --stochastic_round --proj_quant --grad_clipping 1.0",
        "--optimizer galore_adamw8bit --galore_scale 0.25 --rank 256 --update_proj_gap 200",
        "--optimizer galore_adamw8bit --proj_quant",
        "--optimizer q_galore_adamw8bit",
        "--optimizer q_galore_adamw8bit --weight_quant --weight_group_size 256 --stochastic_round --int8_products",
        "--optimizer q_galore_adamw8bit --simulation --weight_bits 4 --proj_bits 8",
        "--optimizer q_galore_adamw8bit --rank full --no-proj_quant",
        "--optimizer q_galore_adamw8bit --no-weight_quant --no-stochastic_round --no-proj_quant",
        "--optimizer galore_adamw --proj_type full",
        "--optimizer Adam --warmup_steps 0 --grad_clipping 1",
        "--rank 512 --optimizer galore_adamw",
        "--scheduler cosine_restarts",
        "--scheduler linear --min_lr_ratio 0",
        "--scheduler constant",
        "--scheduler wsd --decay_steps 0.2 --decay_shape exponential",
        "--scheduler wsd --decay_steps 9e3 --decay_shape linear --min_lr_ratio 0",
    ],
)
def test_combinations_that_work(text: str) -> None:
    assert parse(text).warnings == ()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("--rank 64 --optimizer adamw", "--rank changes nothing: --optimizer adamw has no subspace"),
        ("--rank 64 --svd_method full", "--rank, --svd_method change nothing: --optimizer adam has no subspace"),
        (
            "--weight_bits 4 --weight_group_size 64",
            "--weight_bits, --weight_group_size change nothing without --weight_quant",
        ),
        ("--optimizer galore_adamw8bit --proj_bits 8", "--proj_bits changes nothing without --proj_quant"),
        ("--optimizer q_galore_adamw8bit --no-weight_quant --weight_bits 4", "nothing with --no-weight_quant"),
        ("--num_training_steps 20", "--warmup_steps 1000 is not less than the run's 20 updates"),
        ("--restart_cycles 2", "--restart_cycles changes nothing: --scheduler cosine has no restarts"),
        ("--decay_steps 10", "--decay_steps changes nothing: --scheduler cosine has no decay of its own length"),
        ("--scheduler constant --decay_steps 10 --decay_shape linear", "--decay_steps, --decay_shape change nothing: "),
        ("--scheduler constant --min_lr_ratio 0.2", "--min_lr_ratio changes nothing: --scheduler constant stays at"),
        ("--scheduler wsd --num_training_steps 20", "--warmup_steps 1000 is not less than the run's 20 updates"),
        ("--int8_activations --activation_checkpointing", "--int8_activations changes nothing: --activation_"),
        (
            "--int8_activations --activation_checkpointing --checkpoint_layers 8",
            "changes nothing: --activation_checkpointing --checkpoint_layers 8 recomputes every layer",
        ),
        (
            "--int8_activations --recompute mlp",
            "changes nothing: --recompute mlp recomputes gate and up of every layer",
        ),
        ("--beta2 0.9 --adam_eps 1e-6 --optimizer sgd", "--beta2, --adam_eps change nothing: --optimizer sgd has no"),
        (
            "--optimizer galore_adamw --subspace streaming --svd_method full --max_update_proj_gap 300",
            "--svd_method, --max_update_proj_gap change nothing: --subspace streaming makes no SVD",
        ),
        (
            "--optimizer galore_adamw8bit_per_layer --accumulate_by layer",
            "--accumulate_by layer has one micro-batch an update and nothing to sum",
        ),
        (
            "--optimizer galore_adamw8bit --accumulate_by layer --gradient_accumulation 2",
            "keeps those of all layers for its step: use galore_adamw8bit_per_layer",
        ),
        ("--optimizer muon --accumulate_by layer --gradient_accumulation 2", "use an optimizer _per_layer"),
        ("--check_replicas 5", "--check_replicas changes nothing on one rank"),
        ("--use_hf_model --compile on", "--compile on changes nothing: --use_hf_model runs transformers' layers"),
        ("--tags a,b --wandb_mode off", "--tags changes nothing: wandb is off"),
        ("--int8_activations --compile off", "--int8_activations rounds without saving memory: with --compile off"),
    ],
)
def test_warnings(text: str, warning: str) -> None:
    (found,) = parse(text).warnings
    assert warning in found


BAD_VALUES = [
    ("--lr abc", "--lr is 'abc', it must be a number"),
    ("--lr nan", "--lr is 'nan', it must be a finite number"),
    ("--lr -1e-3", "--lr is -1e-3, it must be more than 0 (rate)"),
    ("--lr 0", "--lr is 0, it must be more than 0"),
    ("--rank 1.5", "--rank is '1.5', it must be a whole number"),
    ("--rank 0", "--rank is '0', it must be a whole number of at least 1"),
    ("--rank 16,", "several such as 128,256,512 for equal parts of the layers, or full"),
    (
        "--rank auto:full",
        "--rank is 'auto:full', it must be auto:256 for the bytes of one rank, a whole number, or full",
    ),
    ("--rank auto:0", "--rank is 'auto:0', it must be a whole number of at least 1"),
    ("--rank auto,64", "several such as 128,256,512 for equal parts of the layers, or full or auto"),
    ("--rank autos", "several such as 128,256,512 for equal parts of the layers, or full or auto"),
    ("--mlp_rank auto", "a whole number of at least 1, as --rank auto deals that of the MLP, too, or full"),
    ("--mlp_rank 16,-2", "--mlp_rank is '16,-2', it must be a whole number of at least 1"),
    ("--beta2 1", "--beta2 is 1, it must be more than 0 and less than 1"),
    ("--min_lr_ratio 1.5", "--min_lr_ratio is 1.5, it must be at least 0 and at most 1"),
    ("--optimizer adma", "--optimizer is 'adma', it must be one of adam, adamw"),
    ("--optimizer adma", "did you mean adam?"),
    ("--optimizer qgalore", "did you mean q_galore_adamw8bit or q_galore_adamw8bit_per_layer?"),
    ("--optimizer Q-GaLore", "did you mean q_galore_adamw8bit or q_galore_adamw8bit_per_layer?"),
    ("--optimizer qgalore_per_layer", "did you mean q_galore_adamw8bit_per_layer?"),
    ("--optimizer galore", "did you mean galore_adamw?"),
    ("--optimizer adamw_bnb_8bit", "did you mean adam8bit?"),
    ("--optimizer galore_adamw_layerwise", "did you mean galore_adamw8bit_per_layer?"),
    ("--dtype int8", "--dtype is 'int8', it must be one of bfloat16, float32, float16"),
    ("--weight_bits 2", "--weight_bits is '2', it must be one of 8, 4"),
    ("--max_train_tokens 3Q", "--max_train_tokens is '3Q', it must be a number with an optional suffix K, M, B or T"),
    ("--eval_tokens 0", "--eval_tokens is 0, it must be at least 1 (tokens)"),
    ("--lr", "--lr has no value: write --lr RATE"),
    ("--lr --rank 4", "--lr has no value: write --lr RATE"),
    ("--single_gpu=yes", "--single_gpu is a switch and takes no value: write --single_gpu alone"),
    ("--no-add_eos=yes", "--no-add_eos is a switch and takes no value: write --no-add_eos alone"),
    ("--no-single_gpu", "--no-single_gpu is no flag of this program: did you mean --single_gpu?"),
    (
        "--save_dir ~no-such-user/run",
        "--save_dir is '~no-such-user/run', a path whose ~no-such-user is the folder of a user: there is no",
    ),
    ("--weight-quant", "--weight-quant is no flag of this program: did you mean --weight_quant?"),
    ("--seed 1.5", "--seed is '1.5', it must be a whole number"),
    ("--rank 1.5e0", "--rank is '1.5e0', it must be a whole number of at least 1"),
    ("--seed 1e-1", "--seed is '1e-1', it must be a whole number"),
    ("--seed 1e999999999", "--seed is '1e999999999', it must be a whole number"),
    ("--seed inf", "--seed is 'inf', it must be a whole number"),
    ("--max_train_tokens 1.5", "--max_train_tokens is '1.5', it must be a number with an optional suffix K, M, B or T"),
    ("--eval_tokens 1e-3", "--eval_tokens is '1e-3', it must be a number with"),
    ("--decay_steps 1.5", "--decay_steps is '1.5', it must be a whole number of updates, or a share of the run below"),
    ("--decay_steps 0", "--decay_steps is 0, it must be more than 0"),
    ("--learning_rat 3", "--learning_rat is no flag of this program"),
    ("--learning_rate 3e-4", "--learning_rate is no flag of this program: write --lr 3e-4"),
    ("--steps 1e3", "--steps is no flag of this program: write --num_training_steps 1e3"),
    ("--max_steps=7", "--max_steps is no flag of this program: write --num_training_steps 7"),
    ("--Gradient-Accumulation-Steps 4", "is no flag of this program: write --gradient_accumulation 4"),
    ("--per_device_train_batch_size", "--per_device_train_batch_size is no flag of this program: write --batch_size"),
    ("--gradient_checkpointing true", "is no flag of this program: write --activation_checkpointing"),
    ("--output_dir out", "--output_dir is no flag of this program: write --save_dir out"),
    ("--seq_len 512", "--seq_len is no flag of this program: write --max_length 512"),
    ("--epochs 3", "--epochs is no flag of this program: a run is as long as --num_training_steps (updates) or"),
    ("--warmup_ratio 0.1", "--warmup_ratio is no flag of this program: give --warmup_steps, in updates: the share"),
    ("--model 60m", "--model is no flag of this program: write --model_config 60m"),
    ("--resume", "--resume is no flag of this program: give --continue_from auto with the --save_dir of the run"),
    ("--bf16", "--bf16 is no flag of this program: bfloat16 is what --dtype is without being given"),
    ("--report_to tensorboard", "metrics.jsonl is always written; --tensorboard writes event files beside it"),
    ("--warmup 5", "--warmup is no flag of this program: did you mean --warmup_steps?"),
    ("--xyzzy 5", "--xyzzy is no flag of this program: --help lists them all"),
    ("stray", "'stray' belongs to no flag"),
]


@pytest.mark.parametrize(("text", "message"), BAD_VALUES)
def test_bad_values(text: str, message: str) -> None:
    assert message in refusal([*REQUIRED, *text.split()])


def test_what_is_right_for_a_flag_from_elsewhere_exists() -> None:
    names = {spec.name for spec in specs()}
    assert flags_in_advice() - {"nproc_per_node"} <= names
    assert not (RENAMED.keys() | ADVICE.keys()) & names and not RENAMED.keys() & ADVICE.keys()
    meant = {
        right
        for text in tried_names._OPTIMIZERS.values()
        for x in text.split()
        for right in tried_names.meant_values("optimizer", x)
    }
    assert meant == tried_names._OPTIMIZERS.keys() <= {*OPTIMIZERS}


def test_a_required_flag_under_another_name_is_one_problem() -> None:
    text = refusal(["--model_config", CONFIG, "--per_device_train_batch_size", "8"])
    assert text == "--per_device_train_batch_size is no flag of this program: write --batch_size 8"


def test_float16_is_named_where_it_is_there() -> None:
    assert what_is_right("--fp16", "", (), ("bfloat16", "float16")) == "write --dtype float16"
    assert what_is_right("--fp16", "", (), ("bfloat16",)).startswith("use bfloat16")


GALORE, Q_GALORE = "--optimizer galore_adamw", "--optimizer q_galore_adamw8bit"
INT8_PRODUCTS = f"{Q_GALORE} --int8_products"
BAD_COMBINATIONS = [
    ("--total_batch_size 20", 1, "--total_batch_size 20 is no multiple of --batch_size 8 x 1 rank = 8: the nearest"),
    ("--total_batch_size 20", 2, "--batch_size 8 x 2 ranks = 16: the nearest that work are 16 or 32"),
    ("--total_batch_size 8", 2, "--total_batch_size 8 is less than --batch_size 8 x 2 ranks = 16: give at least 16"),
    ("--total_batch_size 32 --gradient_accumulation 2", 1, "give --gradient_accumulation 4"),
    ("--checkpoint_every 2", 1, "--checkpoint_every 2 needs --activation_checkpointing"),
    ("--checkpoint_every 2 --activation_checkpointing --use_hf_model", 1, "transformers' recomputes every layer"),
    ("--checkpoint_layers 2", 1, "--checkpoint_layers 2 needs --activation_checkpointing"),
    (
        "--checkpoint_layers 2 --checkpoint_every 3 --activation_checkpointing",
        1,
        "--checkpoint_every 3 and --checkpoint_layers 2 both say which layers are recomputed",
    ),
    ("--checkpoint_layers 99 --activation_checkpointing", 1, "--checkpoint_layers 99 is more than the 8 layers of"),
    ("--recompute attention,mlp:99", 1, "--recompute mlp:99 is more than the 8 layers of"),
    (
        "--recompute mlp --checkpoint_layers 2",
        1,
        "in how many first layers: write --recompute mlp:2, or leave --checkp",
    ),
    (
        "--recompute attention:3,qkv --checkpoint_layers 2",
        1,
        "write --recompute attention:2,qkv:2, or leave --checkpoint_layers out",
    ),
    ("--recompute attention --checkpoint_every 2", 1, "in how many first layers: leave --checkpoint_every out"),
    ("--recompute mlp --activation_checkpointing", 1, "recomputes all that --recompute mlp names: leave one out"),
    ("--recompute mlp --use_hf_model", 1, "--recompute is for the project's own LLaMA"),
    ("--recompute gate", 1, "--recompute is 'gate', it must be names of attention, residual, qkv, mlp, each perhaps"),
    ("--int8_activations --use_hf_model", 1, "--int8_activations is for the project's own LLaMA"),
    ("--weight_quant", 1, "--weight_quant cannot work with --optimizer adam, which updates float weights"),
    (f"{GALORE} --weight_quant", 1, "use q_galore_adamw8bit or q_galore_adamw8bit_per_layer"),
    (f"{Q_GALORE} --no-weight_quant --stochastic_round", 1, "--stochastic_round is about quantized weights"),
    (f"{Q_GALORE} --no-weight_quant --simulation", 1, "weights: leave it or --no-weight_quant out"),
    (f"{GALORE} --int8_products", 1, "--int8_products is about quantized weights: use a q_galore optimizer, or leave"),
    (f"{GALORE} --rounding_feedback 0.5 --rank full --direction orthogonal", 1, "--rounding_feedback 0.5 is about qu"),
    (f"{INT8_PRODUCTS} --weight_bits 4", 1, "not in --weight_bits 4: use --weight_bits 8 or leave --int8_products out"),
    (f"{INT8_PRODUCTS} --simulation", 1, "--simulation stores float weights: leave one out"),
    (f"{INT8_PRODUCTS} --weight_group_size 128", 1, "--weight_group_size 128 cannot work with --int8_products"),
    ("--fp8_products", 1, "and --optimizer adam trains ordinary ones: use a galore or q_galore optimizer, or leave"),
    (f"{INT8_PRODUCTS} --fp8_products", 1, "--fp8_products and --int8_products are two ways to multiply"),
    (f"{GALORE} --fp8_weight_gradients", 1, "--fp8_weight_gradients comes beside --fp8_products: give both, or leave"),
    (f"{GALORE} --fp8_head", 1, "--fp8_head comes beside --fp8_products: give both, or leave it out"),
    (f"{GALORE} --fp8_products --dtype float16", 1, "--dtype float16 does not hold: use --dtype bfloat16"),
    ("--proj_quant", 1, "--proj_quant cannot work with --optimizer adam, which has no projections"),
    ("--single_gpu", 2, "--single_gpu runs one process, torchrun started 2: use --nproc_per_node 1"),
    ("--shard optimizer", 64, "--shard optimizer: 64 ranks share a model of 58 matrices, and some would own none"),
    (
        f"{Q_GALORE} --rank full --sum_in_momentum --shard full --shard_sums rank",
        2,
        "each rank would sum in momenta of all matrices, and with --shard full only the owner of a matrix has one",
    ),
    ("--shard full --shard_sums rank", 2, "sums of all matrices on every rank are what it does without"),
    ("--shard_sums owner", 2, "--shard_sums owner is about matrices that have owners, and with --shard none none has"),
    ("--optimizer sgd --shard optimizer --shard_sums owner", 2, "--shard_sums owner cannot work with --optimizer sgd"),
    (f"{Q_GALORE} --shard full --accumulate_by layer --shard_sums owner", 2, "--shard_sums owner would only send more"),
    ("--optimizer sgd --shard full", 2, "--shard full cannot work with --optimizer sgd, which is another library's"),
    ("--use_hf_model --shard full", 2, "transformers' run theirs in their own way: use --shard optimizer"),
    ("--average_last 0.1 --shard full", 2, "--shard full cannot work with --average_last 0.1"),
    ("--optimizer adamw --method lora --rank 8 --shard full", 2, "and --method lora trains others beside"),
    ("--nproc 8", 1, "--nproc 8 is the number of ranks that --dry_run describes: start a run by torchrun"),
    (f"{GALORE} --subspace streaming --proj_type full", 1, "--proj_type full projects both sides"),
    (f"{Q_GALORE} --rank full --proj_quant", 1, "--proj_quant has no meaning with --rank full, which projects nothing"),
    (f"{Q_GALORE} --rank full --subspace svd", 1, "--subspace svd has no meaning with --rank full"),
    (f"{GALORE} --rank full --direction normuon --momentum_rank 512", 1, "--momentum_rank is 512, but"),
    (f"{GALORE} --rank 64,2000", 1, "--rank is 2000, but"),
    (f"{GALORE} --rank {','.join(map(str, range(1, 100)))}", 1, "--rank has 99 ranks for parts of the layers"),
    (f"{Q_GALORE} --rank 64,full --momentum_rank 16", 1, "--momentum_rank 16 stores the momentum of a full rank"),
    (f"{GALORE} --rank full --momentum_rank 1/16", 1, "--direction adam needs every value of it and a second moment"),
    (f"{Q_GALORE} --rank full --momentum_rank 1/0", 1, "a share of the shorter side such as 1/16"),
    (f"{Q_GALORE} --rank full --momentum_rank 1/1", 1, "a share of the shorter side such as 1/16"),
    (f"{Q_GALORE} --rank full --momentum_rank 2.5", 1, "must be a whole number of dimensions, or a share"),
    (f"{Q_GALORE} --rank full --momentum_rest_bits 2", 1, "--momentum_rest_bits 2 is about a momentum in parts"),
    (
        f"{Q_GALORE} --momentum_rank 16 --recipe orthogonal",
        1,
        "--momentum_rank 16 stores the momentum of a full rank in parts, and --rank 224",
    ),
    (f"{Q_GALORE} --rank full --mlp_rank 64 --momentum_rank 16", 1, "and --mlp_rank 64 projects it"),
    (f"{GALORE} --rank full --mlp_rank full --update_proj_gap 50", 1, "leave it out, or give a number of dimensions"),
    (f"{GALORE} --rank full --mlp_rank 64 --subspace streaming --proj_type full", 1, "--proj_type full projects both"),
    (
        "--optimizer muon --full_rank_second_moment row",
        1,
        "row cannot work with --optimizer muon, which is",
    ),
    (
        "--optimizer adam --cautious_decay",
        1,
        "--cautious_decay cannot work with --optimizer adam: its decay is part of",
    ),
    ("--optimizer galore_adamw --rank half", 1, "--rank is 'half', it must be a whole number of at least 1"),
    (
        f"{GALORE} --newton_schulz polar4",
        1,
        "--newton_schulz polar4 orthogonalises a momentum, and --direction adam has",
    ),
    (f"{GALORE} --rank full --direction adam --newton_schulz polar5", 1, "or use direction orthogonal or normuon"),
    (f"{GALORE} --newton_schulz polar6", 1, "--newton_schulz is 'polar6'"),
    (f"{GALORE} --subspace streaming --svd_method randomized", 1, "--svd_method randomized is for subspaces by SVD"),
    (f"{GALORE} --max_update_proj_gap 10", 1, "--max_update_proj_gap 10 is less than --update_proj_gap 50"),
    (f"{GALORE} --rank 513", 1, "--rank is 513"),
    (f"{GALORE} --rank 513", 1, "give at most 512"),
    ("--max_length 1025", 1, "--max_length is 1025"),
    ("--optimizer galore_adamw8bit_per_layer --grad_clipping 1", 1, "the global norm needs all gradients at once"),
    ("--optimizer q_galore_adamw8bit_per_layer --grad_clipping 1", 1, "or q_galore_adamw8bit"),
    ("--optimizer sgd --grad_accum_dtype int8", 1, "--grad_accum_dtype int8 cannot work with --optimizer sgd"),
    ("--optimizer muon --norm_growth 1.01", 1, "--norm_growth cannot work with --optimizer muon: use --grad_clipping"),
    (f"{GALORE} --norm_growth 0.9", 1, "--norm_growth 0.9 would let gradients only shrink: give 1 or more"),
    (f"{GALORE} --residual fira --proj_type full", 1, "--residual fira scales across one projected side"),
    ("--data_lanes 10", 4, "--data_lanes 10 is not divisible by the 4 ranks"),
    ("--data_lanes 10", 4, "a new run with --data_lanes 12"),
    ("--dataset ./nowhere/c4", 1, "--dataset ./nowhere/c4 is neither c4 nor pydocs nor a file or folder that exists"),
    ("--tokenizer ./nowhere", 1, "--tokenizer ./nowhere does not exist"),
    ("--unset_wandb --wandb_mode online", 1, "--unset_wandb and --wandb_mode online contradict each other"),
    ("--continue_from auto", 1, "--continue_from auto looks for checkpoints in --save_dir: give --save_dir"),
    ("--continue_from nowhere", 1, "--continue_from nowhere does not exist"),
    (f"--continue_from {__file__}", 1, f"--continue_from {__file__} is a file: give a folder step_..."),
    (
        "--scheduler cosine_restarts --warmup_steps 0 --num_training_steps 3",
        1,
        "--restart_cycles 4 is more than the 3 updates after the warm-up: give at most 3",
    ),
    (
        "--scheduler wsd --decay_steps 9001",
        1,
        "--decay_steps 9001 is more than the 9000 of 10000 updates after the warm-up: give at most 9000, or fewer",
    ),
    ("--scheduler wsd --decay_steps 0.95", 1, "--decay_steps 0.95, 9500 updates, is more than the 9000 of 10000"),
    (
        "--scheduler wsd --decay_steps 0.01 --num_training_steps 20 --warmup_steps 2",
        1,
        "--decay_steps 0.01 of 20 updates is 0, and a decay takes 2: give a number of updates from 2 on, or",
    ),
    ("--scheduler wsd --decay_steps 1", 1, "--decay_steps 1 of 10000 updates is 1, and a decay takes 2"),
    (
        "--scheduler wsd --decay_shape exponential --min_lr_ratio 0",
        1,
        "--decay_shape exponential never reaches --min_lr_ratio 0: give a ratio such as 0.01",
    ),
]


@pytest.mark.parametrize(("text", "world_size", "message"), BAD_COMBINATIONS)
def test_combinations_that_cannot_work(text: str, world_size: int, message: str) -> None:
    assert message in refusal([*REQUIRED, *text.split()], world_size)


def test_tensorboard_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_pretraining.config.checks.find_spec", lambda _: None)
    assert "--tensorboard needs the package tensorboard, which is not installed: pip install" in refusal(
        [*REQUIRED, "--tensorboard"]
    )
    assert not parse().logging.tensorboard


def test_missing_required_flags() -> None:
    text = refusal([])
    assert "--model_config is missing" in text
    assert "--batch_size is missing" in text
    assert "2 problems" in text


def test_missing_and_broken_model_config(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        return refusal(["--model_config", str(path), "--batch_size", "8"])

    assert str(tmp_path / "none.json") in refused(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert str(broken) in refused(broken)
    broken.write_text('{"hidden_size": 64}', encoding="utf-8")
    assert "intermediate_size" in refused(broken)


def test_all_problems_at_once_and_none_that_follows_from_another() -> None:
    given = "--lr x --optimizer adm --weight_quant --single_gpu --bogus 1"
    text = refusal([*REQUIRED, *given.split()], world_size=2)
    assert "4 problems" in text
    for part in ("--lr is 'x'", "--optimizer is 'adm'", "--single_gpu", "--bogus"):
        assert part in text
    # Whether --weight_quant fits cannot be known while --optimizer is unreadable.
    assert "--weight_quant" not in text


@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_a_tilde_is_expanded_in_every_flag_that_takes_a_path(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves --flag=~/x as it is, and so do scripts and schedulers."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.json").write_text(Path("configs/llama_60m.json").read_text())
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "train.uint16").touch()
    values = {"model_config": "model.json", "dataset": "train.uint16", "tokenizer": "tokenizer.json",
              "save_dir": "run", "continue_from": "step_1", "init_from": "source"}  # fmt: skip
    words = " ".join(form.format(name, f"~/{value}") for name, value in values.items())
    resolved = parse_args([*words.split(), "--batch_size", "8"]).to_dict()
    assert {name: resolved[name] for name in values} == {n: str(tmp_path / value) for n, value in values.items()}
    assert values.keys() == {spec.name for spec in specs() if spec.flag.unit in ("file", "folder", "name_or_path")}
    (tmp_path / "more.uint16").touch()
    assert parse("--dataset ~/train.uint16:1,~/more.uint16:2").data.dataset.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("script", "words"),
    [(export, "{0}/a {0}/b --tokenizer={0}/c --model_config={0}/d"), (plot, "{0}/a --output={0}/b"),
     (tokenize, "--dataset={0}/a --tokenizer={0}/b --output_dir={0}/c"), (generate, "{0}/a x --tokenizer={0}/b"),
     (evaluate, "{0}/a --dataset={0}/b --tokenizer={0}/c"), (report, "{0}/a --output={0}/b --tokenizer={0}/c")],
)  # fmt: skip
def test_a_tilde_is_expanded_in_the_flags_of_scripts(
    script: ModuleType, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.parse_args(words.format("~").split()) == script.parse_args(words.format(tmp_path).split())
    with pytest.raises((SystemExit, UserError)):
        script.parse_args(words.format("~no-such-user").split())


if __name__ == "__main__":
    print(command_line(), end="")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("--residual none", "recipe orthogonal, because of --residual none: flags left out have its values, "),
        ("--proj_type std --rank 64", "recipe orthogonal, because of --proj_type std and --rank 64: flags left out"),
        ("--direction adam", "recipe orthogonal, because of --direction adam: flags left out have its values"),
        (
            "--galore_scale 0.5",
            "recipe paper, because of --galore_scale 0.5: flags left out have the official defaults",
        ),
    ],
)
def test_a_flag_that_chooses_the_recipe_is_named(text: str, note: str) -> None:
    found = [each for each in parse(f"{Q_GALORE} {text}").notes if each.startswith("recipe")]
    assert len(found) == 1 and found[0].startswith(note)
    for given in ("", "--rank full", "--recipe orthogonal", "--rank full --galore_scale 0.5"):
        assert not any(each.startswith("recipe") for each in parse(f"{Q_GALORE} {given}").notes)


@pytest.mark.parametrize("method", ["lora", "relora --relora_every 100 --warmup_steps 10 --relora_warmup 5", "qlora"])
def test_a_method_beside_a_subspaces_optimizer_has_one_sentence(method: str) -> None:
    """The rank is its recipe's, and nobody has given it."""
    with pytest.raises(UserError) as raised:
        parse(f"{Q_GALORE} --method {method}")
    assert "cannot work with --method" in str(raised.value) and "--rank full" not in str(raised.value)
    with pytest.raises(UserError, match="--rank full cannot work with --method"):
        parse(f"{Q_GALORE} --method {method} --rank full")
