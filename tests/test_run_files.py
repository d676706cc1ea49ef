"""What a run's folder says of the run itself, and the first lines that the run prints: which model, which commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from peft_pretraining.commands.export import export
from peft_pretraining.config.parse import parse_args
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.registry import read_config
from peft_pretraining.reporting import run_files
from tests.small_run import CONFIG, SmallRun, flags_of

CIRCUMSTANCES = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}, from update (\d+), 1 rank\(s\), qgalore \S+, torch \S+, python \S+"
    r"(, commit [0-9a-f]{12,}(-dirty)?)?"
)


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def lines_of(folder: Path) -> list[tuple[list[str], int]]:
    """The words of each command in a run's folder, and the updates that were made before it."""
    found = []
    for line in (folder / "command.txt").read_text().splitlines():
        circumstances = CIRCUMSTANCES.fullmatch(line.partition("  # ")[2])
        assert circumstances, line
        found.append((shlex.split(line, comments=True), int(circumstances[1])))
    return found


def test_a_folder_has_the_model_and_every_command(small: SmallRun, tmp_path: Path) -> None:
    """Beside checkpoints, which are listed and exported as before."""
    flags: dict[str, object] = {"num_training_steps": 1, "tags": "it's #1"}
    folder = small.run("run", **flags).save_dir
    assert json.loads((folder / "config.json").read_text()) == json.loads(small.config.read_text())
    ((command, step),) = lines_of(folder)
    assert command == ["python", "run_pretrain.py", *small.argv("run", flags)] and step == 0
    assert parse_args(command[2:]).to_dict() == parse_args(small.argv("run", flags)).to_dict()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert small.main("run", seed=1, continue_from="auto") == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before, "it was refused"
    longer = flags | {"num_training_steps": 2, "continue_from": "auto"}
    result = small.run("run", **longer)
    assert [step for _, step in lines_of(folder)] == [0, 1]
    assert lines_of(folder)[1][0][2:] == small.argv("run", longer)
    assert [path.name for path in result.checkpoints] == ["step_00000001", "step_00000002"]
    assert not list(folder.glob(".tmp_*"))
    export(folder, tmp_path / "exported", "float32")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_transformers_reads_the_model_of_a_run(small: SmallRun) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    raw = {key: value for key, value in CONFIG.items() if key != "model_type"}
    small.config.write_text(json.dumps(raw))  # a LLaMA here, and unknown to transformers
    args = parse_args(small.argv("run"))
    run_files.write_run_files(args, read_config_json(args.model.model_config), 0)
    config = transformers.AutoConfig.from_pretrained(small.folder / "run")
    assert (type(config).__name__, config.hidden_size, config.vocab_size) == ("LlamaConfig", 64, 256)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(param.numel() for param in model.parameters()) == read_config(small.config).parameter_count()


def test_the_config_of_something_else_is_not_overwritten(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    kept = small.folder / "run" / "config.json"
    kept.parent.mkdir()
    kept.write_text('{"model_type": "gpt2"}')
    assert small.main("run", num_training_steps=1) == 2
    assert f"{kept} is not of this model, nor of a run: give another --save_dir" in capsys.readouterr().err
    assert kept.read_text() == '{"model_type": "gpt2"}'
    # That of this model stays as it is, and that of an earlier start, which ended before a checkpoint, goes.
    kept.write_text(text := json.dumps(CONFIG))
    run_files.write_run_files(parse_args(small.argv("run")), read_config_json(small.config), 0)
    assert kept.read_text() == text
    small.config.write_text(json.dumps(CONFIG | {"intermediate_size": 96}))
    run_files.write_run_files(parse_args(small.argv("run")), read_config_json(small.config), 0)
    assert json.loads(kept.read_text())["intermediate_size"] == 96


@pytest.mark.parametrize(
    "word", ["it's", "a b", "two\nlines", "tab\tand 'quotes' \\", "ä", "\xe9\nb\x80", "a\udcff", ""]
)
def test_a_command_is_one_line_that_a_shell_reads_back(word: str) -> None:
    line = run_files.command_line(["--name", word])
    assert len(line.splitlines()) == 1 and line.startswith("python run_pretrain.py --name ")
    words = line.removeprefix("python run_pretrain.py ")
    done = subprocess.run(["bash", "-c", f"printf '%s|' {words}"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape") == f"--name|{word}|"


@pytest.mark.parametrize(
    ("program", "beginning"),
    [("/usr/bin/qgalore", "qgalore pretrain"), ("peft_pretraining/__main__.py", "python -m peft_pretraining pretrain")],
)
def test_a_command_begins_as_it_was_typed(program: str, beginning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [program, "pretrain"])
    assert run_files.command_line(["--lr", "1"]) == f"{beginning} --lr 1"


def test_a_program_that_is_no_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "_TREE", tmp_path)
    run_files.commit.cache_clear()
    assert run_files.commit() == ""
    (tmp_path / ".git").mkdir()  # not a repository
    run_files.commit.cache_clear()
    assert run_files.commit() == ""
    run_files.commit.cache_clear()


# ---- the first lines

FIRST = """\
model       small, 73,920 parameters, 1 layer, width 64
weights     40,960 in INT8 in groups of 48, rounded stochastically; 32,960 in float32
optimizer   q_galore_adamw8bit_per_layer, recipe paper, direction adam, norms of gradients grow by 1.01 at most
subspace    rank 32, svd, INT4 projections, a refresh every 3 updates, scale 1
rates       lr 0.01, weight decay 0.1; of embeddings, head and norms 0.02 and 0.1
schedule    starts at its peak, falls (cosine) to 0.1 of it at update 1
updates     1 of 256 tokens (8 sequences of 32 in 2 micro-batches), 256 in all
memory      {peak:.3g} GB planned a rank, {lasting:.3g} of it weights and optimizer states
"""


GROUPED = "grouped.json"


def test_a_run_begins_with_what_it_is(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """In few lines, which --dry_run prints, too."""
    flags: dict[str, object] = flags_of("q_galore_adamw8bit_per_layer") | {
        "weight_quant": None, "stochastic_round": None, "proj_quant": None, "num_training_steps": 1,
        "weight_decay": 0.1, "full_rank_lr": 0.02, "norm_growth": 1.01,
    }  # fmt: skip
    assert small.main("run", **flags) == 0
    said = capsys.readouterr().err.splitlines()
    planned = plan(parse_args(small.argv("run", flags)), read_config(small.config))
    first = FIRST.format(peak=planned.peak_bytes / 1e9, lasting=planned.weights_and_states_bytes / 1e9)
    assert said[:8] == first.splitlines()
    assert said[8].startswith("data        ") and said[9].startswith("validation  ")
    assert said[10:12] == ["device      1 x cpu", f"folder      {small.folder / 'run'}"]
    assert small.main("other", dry_run=True, **flags) == 0
    printed = capsys.readouterr().out
    assert first in printed and said[8] in printed and "device      1 x cpu" in printed


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"optimizer": "adamw"}, ["weights     all in float32", "optimizer   adamw"]),
        (
            {"simulation": True, "weight_bits": 4},
            ["float32 on the grid of INT4 in groups of 256 (simulation), rounded"],
        ),
        ({"stochastic_round": False}, ["in INT8 in groups of 256, rounded to nearest; "]),
        ({"int8_products": True}, ["in INT8 in groups of a row, rounded"]),
        ({"fp8_products": True}, ["in INT8 in groups of 256, rounded stochastically, multiplied in FP8; "]),
        ({"rank": "full"}, ["subspace    rank full: no projections; scale 0.5\n"]),
        ({"newton_schulz": "muon_fp8", "rank": "full"}, ["scale 0.5; momenta orthogonalised in FP8\n"]),
        ({"model_config": "configs/llama_130m.json"}, ["momenta orthogonalised in FP8 on a GPU that has it\n"]),
        ({"model_config": "configs/llama_60m.json"}, ["subspace    rank full: no projections; scale 0.5\n"]),
        (
            {"model_config": GROUPED},
            ["; momenta of 5 of 7 matrices a layer orthogonalised in FP8 on a GPU that has it\n"],
        ),
        ({"newton_schulz": "muon_fp8", "model_config": GROUPED}, ["scale 0.5; momenta orthogonalised in FP8\n"]),
        (
            {"newton_schulz": "auto", "recipe": "orthogonal", "rank": 768, "mlp_rank": 64}
            | {"model_config": "configs/llama_130m.json"},
            ["updates, scale 0.5; momenta of 4 of 7 matrices a layer orthogonalised in FP8 on a GPU that has it\n"],
        ),
        ({"newton_schulz": "muon_fp8", "rank": 32}, ["updates, scale 0.5; momenta orthogonalised in FP8\n"]),
        ({"newton_schulz": "auto", "recipe": "paper", "rank": 32}, ["updates, scale 1\n"]),
        ({"mlp_rank": 16, "proj_quant": False}, ["rank 24, 16 in the MLP, streaming, float projections"]),
        ({"grad_clipping": 2.0}, ["clipping at 2"]),
        ({"max_train_tokens": "3.2B"}, ["updates     12,500,000 of 256 tokens (8 sequences", "3.2 billion in all"]),
    ],
)
def test_what_the_first_lines_say_of_other_runs(
    small: SmallRun, flags: dict[str, object], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    grouped = small.folder / GROUPED  # keys and values of 256 rows
    grouped.write_text(
        json.dumps(
            CONFIG
            | {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 2048}
        )
    )
    if flags.get("model_config") == GROUPED:
        flags = flags | {"model_config": grouped}
    assert small.main("run", dry_run=True, **{"optimizer": "q_galore_adamw8bit"} | flags) == 0
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed
