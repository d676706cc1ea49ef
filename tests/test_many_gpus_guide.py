"""docs/guide/many_gpus.md and docs/guide/sharded_sums.md: commands are command lines, figures those of the plan."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.rows import ROOT
from docs.make.scaling_tables import newest_of_each
from peft_pretraining.build import model_on_meta, shape_of
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.dealt_states import dealt_weights, is_table
from peft_pretraining.memory.plan import plan
from peft_pretraining.memory.planned_run import PlannedRun
from peft_pretraining.models.build import low_rank_names

GUIDE = ROOT / "docs" / "guide"
TEXT = "".join((GUIDE / name).read_text(encoding="utf-8") for name in ("many_gpus.md", "sharded_sums.md"))
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()
]  # fmt: skip


def flags_of_command(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("run_pretrain.py") + 1 :]


@pytest.mark.parametrize("command", [line for line in COMMANDS if "run_pretrain.py" in line])
def test_commands_are_read_on_all_their_ranks(command: str) -> None:
    ranks = [int(number) for number in re.findall(r"--n(?:nodes|proc_per_node) (\d+)", command)]
    world_size = ranks[0] * (ranks[1] if len(ranks) > 1 else 1) if ranks else 1
    args = parse_args(flags_of_command(command), world_size)
    assert args.runtime.shard != "none" and args.batch.total_batch_size == 512
    assert not [text for text in args.warnings if "--shard" in text]


def test_scripts_of_the_page_are_there() -> None:
    (command,) = [line for line in COMMANDS if line.startswith("sbatch")]
    scripts = [word for word in shlex.split(command) if word.endswith(".sh")]
    assert len(scripts) == 2 and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("row", re.findall(r"^\| (\d) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE))
def test_planned_bytes_are_those_of_the_plan(row: tuple[str, str]) -> None:
    (command,) = [line for line in COMMANDS if "--dry_run" in line]
    ranks, cells = row[0], row[1].split(" | ")
    expected = []
    for model, rank in (("7b", "1024"), ("13b", "1280")):
        for shard in ("none", "optimizer", "full"):
            changed = {"--model_config": f"configs/llama_{model}.json", "--rank": rank, "--nproc": ranks}
            words = flags_of_command(command)
            for flag, value in (changed | {"--shard": shard}).items():
                words[words.index(flag) + 1] = value
            args = parse_args(words)
            config = shape_of(args.model)
            assert config is not None and args.world_size == int(ranks)
            expected.append(f"{plan(args, config).peak_bytes / 1e9:.1f}")
    assert cells == expected


SENT = re.findall(r"^\| `(--shard [^`]+)` \| ([\d.]+) \| ([\d.]+) \|$", TEXT, flags=re.MULTILINE)


def sent_of(run: PlannedRun) -> float:
    """What a rank sends in an update beside an all-reduce of the gradient in bfloat16.

    The updated codes once and the gradient once; of `full` codes twice and bases once a pass instead; of embeddings and
    head, in bfloat16, the gradient and what has become of it, or of `full` each once a pass instead, and the embeddings
    once more where the first layer makes its own backward pass. An all-reduce is sent twice, all others once.
    """
    args, model = run.args, model_on_meta(run.args, run.config)
    weights = dealt_weights(run)
    of_layer = [model.get_submodule(name) for name in low_rank_names(model)]
    codes = run.config.num_hidden_layers * sum(
        tensor.nbytes for module in of_layer for tensor in (*module.parameters(), *module.buffers())
    )
    bases = sum(weight.stored for weight in weights if weight.is_matrix) - codes
    gradient = 2 * run.config.num_hidden_layers * sum(matrix.gradient for matrix in run.matrices)
    rest = sum(2 * weight.load.values for weight in weights if not weight.is_matrix)
    micro_batches = args.batch.gradient_accumulation
    gathers = micro_batches if args.owners_sum else 1
    sums = (micro_batches if args.owners_sum else 1) * (gradient + rest)
    moved = gathers * (2 * codes + bases) if args.runtime.shard == "full" else codes
    tables = sum(2 * weight.load.values for weight in weights if is_table(run, weight))
    moved += gathers * tables * (3 if args.by_layer else 2) // 2 - tables
    return (moved + sums + rest) / (4 * sum(weight.load.values for weight in weights))


@pytest.mark.parametrize(("flags", "planned", "sent"), SENT)
def test_who_sums_decides_memory_and_what_is_sent(flags: str, planned: str, sent: str) -> None:
    (command,) = [line for line in COMMANDS if "llama_13b" in line and "torchrun" in line]
    words = flags_of_command(command)
    words = [*words[: words.index("--shard")], *flags.split(), "--device", "cuda", "--dry_run", "--nproc", "2"]
    for flag, value in (("--recipe", "paper"), ("--subspace", "streaming")):
        if words.count("--recipe") > 1:  # another one is given behind it
            del words[words.index(flag) : words.index(value) + 1]
    args = parse_args(words)
    config = shape_of(args.model)
    assert config is not None
    assert planned == f"{plan(args, config).peak_bytes / 1e9:.1f}"
    assert sent == f"{sent_of(PlannedRun(args, config)):.2f}"


def test_13b_takes_14_gb_of_each_of_two_gpus() -> None:
    (command,) = [line for line in COMMANDS if "llama_13b" in line and "torchrun" in line]
    args = parse_args([*flags_of_command(command), "--device", "cuda", "--dry_run", "--nproc", "2"])
    config = shape_of(args.model)
    assert config is not None and args.batch.total_batch_size == 512
    found = plan(args, config)
    assert found.peak_bytes <= 14e9 and f"{found.host / 1e9:.0f} GB a rank here" in TEXT
    assert len(SENT) == 7


def test_there_are_rows_for_two_four_and_eight() -> None:
    assert [row[0] for row in re.findall(r"^\| (\d) \| ([\d. |]+) \|$", TEXT, flags=re.MULTILINE)] == ["2", "4", "8"]


def test_measured_figures_of_four_gpus_are_those_of_the_rows() -> None:
    """7B with an update each micro-batch, in the guide and in the README."""
    found = {
        row["shard"]: row
        for row in newest_of_each()
        if (row["model"], row["gpus"], row["grad_accum"], row["extra"]) == ("7b", "4", "1", "")
    }
    none, optimizer, full = (found[shard] for shard in ("none", "optimizer", "full"))
    ratios = [f"{float(row['ratio']):.2f}" for row in (optimizer, full, none)]
    peaks = [f"{float(row['peak_gb']):.1f}" for row in (optimizer, full, none)]
    guide = " ".join(TEXT.split())
    assert (
        f"`optimizer` {ratios[0]} times the tokens/s of one GPU in {peaks[0]} GB a GPU, `full` {ratios[1]} times in "
        f"{peaks[1]} GB, `none` {ratios[2]} times in {peaks[2]} GB; one GPU takes {float(none['alone_peak_gb']):.1f} GB"
    ) in guide
    sent = [f"{float(row['wire_ratio']):.3f}" for row in (optimizer, full, none)]
    assert f"they sent {sent[0]}, {sent[1]} and {sent[2]} of its bytes" in guide
    rounded = [f"{float(row['ratio']):.1f}" for row in (none, optimizer, full)]
    told = f"7B was trained {rounded[0]}, {rounded[1]} and {rounded[2]} times as fast as on one"
    assert f"{told}, in {peaks[2]}, {peaks[0]} and {peaks[1]} GB a GPU" in (ROOT / "README.md").read_text("utf-8")
