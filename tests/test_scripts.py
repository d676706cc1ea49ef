"""Every shipped script: valid shell, flags that parse, the paper's recipe, and a plot that draws."""

import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.memory.plan import plan
from peft_pretraining.models.registry import read_config
from tests.small_run import TORCHRUN, SmallRun

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("pretrain_c4", "single_gpu")
    for path in (ROOT / "scripts" / folder).rglob("*.sh")
)
SIZES = ("60m", "130m", "350m", "1b", "7b")
METHODS = [
    "q_galore",
    "q_galore_simulation",
    "q_galore_streaming",
    "q_galore_full_rank",
    "q_galore_orthogonal",
    "galore",
    "galore8bit",
    "adamw",
    "adam8bit",
]


@pytest.fixture
def stub(tmp_path: Path) -> str:
    """A launcher that prints its arguments and the environment's method instead of training."""
    path = tmp_path / "stub.py"
    path.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n", encoding="utf-8")
    return f"{sys.executable} -S {path}"


def run_script(script: str, *arguments: str, launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("METHOD", "SAVE_DIR", "NPROC", "VENV")}
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd="/",
        env={**variables, "NO_SETUP": "1", "LAUNCHER": launcher, **environment},
        check=False,
    )


def parsed(script: str, *arguments: str, launcher: str, world_size: int = 1, **environment: str) -> RunArgs:
    """What run_pretrain.py would read from a script's command."""
    done = run_script(script, *arguments, launcher=launcher, **environment)
    assert done.returncode == 0, done.stderr
    program, *argv = json.loads(done.stdout.splitlines()[-1])
    assert program == "run_pretrain.py"
    return parse_args(argv, world_size)


@pytest.fixture(autouse=True)
def _in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the scripts name configs relative to the project


def test_there_is_a_recipe_for_every_row_of_the_paper() -> None:
    names = {Path(script).stem for script in RECIPES}
    assert names == {f"llama_{size}" for size in SIZES} | {"llama_7b_galore", "llama_13b"}


@pytest.mark.parametrize("script", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.sh")))
def test_shell_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", RECIPES)
def test_recipes_parse_without_warnings(script: str, stub: str) -> None:
    args = parsed(script, "--dry_run", launcher=stub)
    assert args.warnings == ()
    assert args.runtime.dry_run
    assert (args.batch.total_batch_size, args.batch.max_length, args.data.dataset) == (512, 256, "c4")
    assert args.checkpoint.save_dir and args.checkpoint.continue_from == "auto"


@pytest.mark.parametrize("script", ["scripts/pretrain_c4/llama_60m.sh", "scripts/single_gpu/llama_7b.sh"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_parse(script: str, method: str, stub: str) -> None:
    if method == "galore" and "single_gpu" in script:
        done = run_script(script, method, launcher=stub)
        assert done.returncode == 1 and "use galore8bit" in done.stderr
        return
    by_argument = parsed(script, method, launcher=stub)
    assert by_argument == parsed(script, launcher=stub, METHOD=method)
    assert by_argument.warnings == ()
    optimizer = by_argument.optimizer
    assert optimizer.is_low_rank == ("galore" in method)
    assert optimizer.per_layer == ("galore" in method and "single_gpu" in script)
    assert by_argument.quantization.weight_quant == method.startswith("q_galore")
    assert by_argument.quantization.simulation == (method == "q_galore_simulation")
    assert method in by_argument.checkpoint.save_dir


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("q_galore")])
def test_the_recipe_is_said(method: str, stub: str) -> None:
    """On the command line, whatever the defaults are."""
    argv = json.loads(run_script("scripts/pretrain_c4/llama_60m.sh", method, launcher=stub).stdout.splitlines()[-1])
    recipe = {"q_galore_orthogonal": "orthogonal", "q_galore_full_rank": "full_rank"}.get(method, "paper")
    assert argv[argv.index("--recipe") + 1] == recipe
    args = parse_args(argv[1:])
    assert (args.optimizer.recipe, args.optimizer.lr) == (recipe, 0.01 if recipe == "full_rank" else 0.015)
    assert (args.subspace.direction, args.subspace.rank) == {
        "orthogonal": ("orthogonal", 224), "full_rank": ("normuon", "full"), "paper": ("adam", 128),
    }[recipe]  # fmt: skip
    one_gpu = parsed("scripts/single_gpu/llama_7b.sh", method, launcher=stub)
    rank = "full" if recipe == "full_rank" else 1024
    assert one_gpu.subspace.rank == rank, "sums over micro-batches of a higher rank do not fit"
    if method != "q_galore_simulation":  # which keeps float weights
        assert plan(one_gpu, read_config(one_gpu.model.model_config)).peak_bytes < 16 * 2**30


@pytest.mark.parametrize("script", ["scripts/pretrain_c4/llama_60m.sh", "scripts/quickstart.sh"])
def test_full_rank_behind_the_default_recipe(script: str, stub: str) -> None:
    """Nothing that a script gives is about projections, which there are none of then."""
    method = ["--dry_run"] if "quickstart" in script else ["q_galore_orthogonal"]
    args = parsed(script, *method, "--rank", "full", launcher=stub)
    assert args.quantization.weight_quant and not args.subspace.projects and not args.subspace.proj_quant


# arXiv 2407.08296: lr, rank, interval, updates, micro-batch, GPUs.
PAPER = {
    "pretrain_c4/llama_60m": (0.015, 128, 200, 10_000, 256, 1),
    "pretrain_c4/llama_130m": (0.015, 256, 200, 20_000, 256, 1),
    "pretrain_c4/llama_350m": (0.01, 256, 200, 60_000, 128, 4),
    "pretrain_c4/llama_1b": (0.01, 512, 200, 100_000, 16, 8),
    "pretrain_c4/llama_7b": (0.004, 1024, 500, 150_000, 8, 64),
    "single_gpu/llama_7b": (0.004, 1024, 500, 150_000, 16, 1),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_are_the_papers(name: str, stub: str) -> None:
    lr, rank, interval, updates, micro_batch, gpus = PAPER[name]
    args = parsed(f"scripts/{name}.sh", launcher=stub, world_size=gpus)
    assert (args.optimizer.lr, args.subspace.rank, args.subspace.update_proj_gap) == (lr, rank, interval)
    assert (args.schedule.num_training_steps, args.schedule.warmup_steps) == (updates, updates // 10)
    assert (args.batch.batch_size, args.batch.total_batch_size) == (micro_batch, 512)
    assert args.batch.gradient_accumulation == 512 // (micro_batch * gpus)
    assert (args.schedule.scheduler, args.schedule.min_lr_ratio) == ("cosine", 0.1)
    assert (args.subspace.galore_scale, args.optimizer.weight_decay, args.optimizer.beta2) == (0.25, 0, 0.95)
    assert (args.subspace.cos_threshold, args.subspace.gamma_proj, args.subspace.queue_size) == (0.4, 2, 5)
    assert args.optimizer.grad_clipping == (1.0 if "7b" in name else 0.0)
    assert args.model.activation_checkpointing == ("single_gpu" in name)
    quantization, subspace = args.quantization, args.subspace
    assert (quantization.weight_bits, subspace.proj_bits) == (8, 4)
    assert quantization.weight_quant and subspace.proj_quant and quantization.stochastic_round
    assert not quantization.simulation


@pytest.mark.parametrize("flags", [(), ("--fp8_products",), ("q_galore_streaming", "--batch_size", "2")])
def test_13b_is_planned_to_fit_24_gigabytes(flags: tuple[str, ...], stub: str) -> None:
    args = parsed("scripts/single_gpu/llama_13b.sh", *flags, launcher=stub)
    assert plan(args, read_config("13b")).peak_bytes < 24e9
    assert (args.batch.total_batch_size, args.subspace.rank, args.runtime.single_gpu) == (512, 1024, True)
    assert (args.subspace.direction == "orthogonal") == ("q_galore_streaming" not in flags)
    assert args.quantization.fp8_products == ("--fp8_products" in flags) and not args.warnings


def test_arguments_are_passed_on_and_win(stub: str) -> None:
    script = "scripts/pretrain_c4/llama_60m.sh"
    args = parsed(script, "adamw", "--lr", "0.5", "--tags", "two words", "--save_dir", "here", launcher=stub)
    assert (args.optimizer.optimizer, args.optimizer.lr) == ("adamw", 0.5)
    assert (args.logging.tags, args.checkpoint.save_dir) == ("two words", "here")
    assert parsed(script, launcher=stub, SAVE_DIR="there").checkpoint.save_dir == "there"


def test_unknown_method_is_a_sentence(stub: str) -> None:
    done = run_script("scripts/pretrain_c4/llama_60m.sh", "qgalore", launcher=stub)
    assert done.returncode == 1
    assert "METHOD is 'qgalore', it must be one of: q_galore " in done.stderr


def test_galore_counterpart_shares_the_recipe(stub: str) -> None:
    args = parsed("scripts/single_gpu/llama_7b_galore.sh", launcher=stub)
    assert args == parsed("scripts/single_gpu/llama_7b.sh", "galore8bit", launcher=stub)
    assert args.optimizer.optimizer == "galore_adamw8bit_per_layer"


@pytest.mark.parametrize("size", SIZES)
def test_simulation_is_the_recipe_with_fake_quantization(size: str, stub: str) -> None:
    script = f"scripts/pretrain_c4/simulation/llama_{size}.sh"
    args = parsed(script, "--lr", "0.5", launcher=stub, METHOD="adamw")
    assert args == parsed(f"scripts/pretrain_c4/llama_{size}.sh", "q_galore_simulation", "--lr", "0.5", launcher=stub)
    assert args.quantization.weight_format.simulate and args.quantization.weight_format.bits == 8
    assert args.subspace.proj_quant and args.optimizer.lr == 0.5
    with pytest.raises(UserError, match="'adamw' belongs to no flag"):
        parsed(script, "adamw", launcher=stub)


def test_an_installed_recipe_runs_where_it_is_called(tmp_path: Path) -> None:
    """A wheel has configs/ and scripts/ beside each other, and no run_pretrain.py there."""
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / "package" / name)
    script = tmp_path / "package/scripts/pretrain_c4/simulation/llama_60m.sh"
    launcher = tmp_path / "launcher.py"
    launcher.write_text("import json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n", encoding="utf-8")
    done = run_script(str(script), "--dry_run", launcher=f"{sys.executable} -S {launcher}")
    assert done.returncode == 0, done.stderr
    folder, *program_and_flags = json.loads(done.stdout.splitlines()[-1])
    assert folder == "/", "the folder that run_script calls it in"
    assert program_and_flags[:3] == ["-m", "peft_pretraining", "pretrain"]
    args = parse_args(program_and_flags[3:])
    assert args.model.model_config == str(tmp_path / "package/configs/llama_60m.json")
    assert args.checkpoint.save_dir == "checkpoints/llama_60m-q_galore_simulation"


def test_torchrun_gets_the_processes(tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    torchrun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = "scripts/pretrain_c4/llama_7b.sh"
    one = run_script(script, launcher="", NPROC="4", PATH=path)
    assert one.stdout.startswith("--nproc_per_node 4 --max-restarts 3 --standalone run_pretrain.py --model_config")
    many = run_script(script, launcher="", NPROC="8", NNODES="8", MASTER_ADDR="first", MAX_RESTARTS="9", PATH=path)
    assert many.stdout.startswith("--nproc_per_node 8 --max-restarts 9 --nnodes 8 --rdzv_backend c10d")
    assert "--rdzv_endpoint first:29500 run_pretrain.py" in many.stdout
    single = run_script("scripts/single_gpu/llama_7b.sh", launcher="", NPROC="4", PATH=path)
    assert single.stdout.startswith("--nproc_per_node 1 --standalone")


def test_without_torchrun_a_recipe_says_where_it_comes_from(tmp_path: Path) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run_script("scripts/pretrain_c4/llama_60m.sh", launcher="", PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: torchrun is not in PATH: activate the environment, or make one with")


def test_quickstart_parses(stub: str) -> None:
    args = parsed("scripts/quickstart.sh", "--dry_run", "--seed", "3", launcher=stub)
    assert args.warnings == ()
    assert (args.data.dataset, args.optimizer.optimizer) == ("pydocs", "q_galore_adamw8bit_per_layer")
    assert args.quantization.weight_quant and args.optimizer.recipe == "full_rank"
    assert args.runtime.seed == 3


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "run_pretrain.py").exists(), reason="run_pretrain.py is not there")
@pytest.mark.parametrize("script", [*RECIPES, "scripts/quickstart.sh"])
def test_dry_run(script: str, tmp_path: Path) -> None:
    save_dir = tmp_path / "run"
    done = run_script(script, "--dry_run", "--save_dir", str(save_dir), "--device", "cpu", launcher=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "llama_" in done.stdout
    assert not save_dir.exists(), "a dry run writes nothing"


SLURM_RUN = """
trap 'echo saved; exit 1' TERM
echo "$NNODES $MASTER_ADDR $1${NPROC:+ on $NPROC}"
[ "$1" = short ] && exit 3
touch "$STARTED"
while :; do sleep 0.1; done
"""


def start_slurm(
    tmp_path: Path, argument: str, recipe: str = SLURM_RUN, nodes: str = "first", gpus: str = ""
) -> "subprocess.Popen[str]":
    """scripts/slurm.sh with stand-ins for SLURM's programs and for the recipe."""
    tools = {"srun": '#!/bin/sh\nexec "$@"\n', "scontrol": '#!/bin/sh\necho "$2" "$1"\n'}
    for name, text in tools.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "recipe.sh").write_text(recipe, encoding="utf-8")
    job = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NNODES": "2",
        "STARTED": str(tmp_path / "started"),
    } | ({"SLURM_GPUS_ON_NODE": gpus} if gpus else {})
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sh"), str(tmp_path / "recipe.sh"), argument],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )


def test_slurm_script_without_a_job_starts_nothing(tmp_path: Path) -> None:
    job = start_slurm(tmp_path, "short", nodes="")
    output, _ = job.communicate(timeout=30)
    assert output == "" and job.returncode not in (0, 3)


def test_slurm_job_that_ends_is_not_queued_again(tmp_path: Path) -> None:
    job = start_slurm(tmp_path, "short")
    output, _ = job.communicate(timeout=30)
    assert output == "2 hostnames show short\n"
    assert job.returncode == 3


def test_slurm_starts_a_rank_for_each_gpu_of_a_node(tmp_path: Path) -> None:
    output, _ = start_slurm(tmp_path, "short", gpus="8").communicate(timeout=30)
    assert output == "2 hostnames show short on 8\n"


def test_slurm_job_saves_and_queues_itself_again(tmp_path: Path) -> None:
    job = start_slurm(tmp_path, "long")
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    lines = output.splitlines()
    assert lines[1] == "saved" and "continues from the newest checkpoint" in lines[2]
    assert lines[3] == "42 requeue"
    assert job.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
def test_slurm_lets_the_ranks_themselves_stop(tmp_path: Path) -> None:
    """Two real ranks under torchrun, which would give them 30 seconds only."""
    small = SmallRun(tmp_path)
    argv = small.argv("run", {"batch_size": 4, "num_training_steps": 4000, "continue_from": "auto"})
    recipe = shlex.join([sys.executable, *TORCHRUN, str(ROOT / "run_pretrain.py"), *argv])
    job = start_slurm(tmp_path, "long", recipe=f"touch $STARTED; exec {recipe}")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    updates = small.result("run").checkpoint().update_step
    assert (tmp_path / "run" / "STOPPED").read_text() == f"SIGUSR1 after {updates} updates\n"
    assert output.splitlines()[-1] == "42 requeue" and job.returncode == 0


def test_old_python_is_refused_with_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    command = f"source {ROOT}/scripts/env.sh; setup_environment train"
    environment = {**os.environ, "PYTHON": str(old), "VENV": str(tmp_path / "venv"), "NO_SETUP": ""}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "3.8.1" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_plot_run_draws_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    lines = [{"update_step": step, "train/loss": 9.0 / step, "train/lr": 0.01} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "plot_run.py"), run_name="__main__")
    assert ended.value.code == 0 and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("glue.sh", ["rte"], ["glue", "--task", "rte", "--method", "q_galore"]),
        ("glue.sh", ["cola", "qlora", "--seed", "3"], ["glue", "--task", "cola", "--method", "qlora", "--seed", "3"]),
        ("mmlu.sh", [], ["mmlu", "--method", "q_galore"]),
        ("mmlu.sh", ["full", "--lr", "1e-5"], ["mmlu", "--method", "full", "--lr", "1e-5"]),
        ("mmlu.sh", ["--lr", "1e-5"], ["mmlu", "--method", "q_galore", "--lr", "1e-5"]),
    ],
)
def test_finetuning_scripts_call_their_program(script: str, arguments: list[str], expected: list[str]) -> None:
    done = run_script(f"scripts/finetune/{script}", *arguments, launcher="echo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-m", f"peft_pretraining.finetune.{expected[0]}", *expected[1:]]


def test_a_finetuning_script_asks_for_its_task_and_takes_the_method_of_the_environment() -> None:
    done = run_script("scripts/finetune/glue.sh", "--lr", "1", launcher="echo")
    assert done.returncode == 1 and "error: give a task of GLUE first, as in: bash" in done.stderr
    assert run_script("scripts/finetune/mmlu.sh", launcher="echo", METHOD="lora").stdout.split()[-1] == "lora"
