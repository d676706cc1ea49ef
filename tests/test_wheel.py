"""The built package: what is in the wheel, and that a fresh environment with the wheel alone trains a model.

Builds are made from a copy of the tree with the setuptools that is installed, and fresh environments borrow all other
packages from this one: nothing needs a network.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from peft_pretraining.commands import COMMANDS
from tests.small_run import CONFIG, write_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("LICENSE", "README.md", "configs", "peft_pretraining", "pyproject.toml", "qgalore", "run_pretrain.py",
           "scripts", "setup.py")  # fmt: skip
RECIPES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("recipe.sh", "env.sh", "pretrain_c4/**/*.sh", "single_gpu/*.sh", "finetune/*.sh")
    for path in (ROOT / "scripts").glob(pattern)
)


def call(command: Sequence[object], folder: Path, **variables: str) -> str:
    """What a command prints that must end well; it sees no packages but those of its environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    inherited |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | variables
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=inherited, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "__pycache__" not in path.parts}


def build(kind: str, tree: Path, target: Path) -> Path:
    """Build the wheel or the sdist of a tree, as pip does without isolation."""
    program = f"import setuptools.build_meta as build, sys; print(build.build_{kind}(sys.argv[1]))"
    target.mkdir(exist_ok=True)
    return target / call([sys.executable, "-c", program, target], tree).splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, and of a file that it must leave out."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77", reason="setuptools 77 or newer builds the package")
    before = files_of(tree)
    built = build("wheel", tree, tmp_path_factory.mktemp("wheel"))
    assert files_of(tree) == before, "a build leaves nothing behind"
    return built


def test_the_wheel_has_the_code_the_configs_and_the_recipes(wheel: Path) -> None:
    expected = {"run_pretrain.py": "run_pretrain.py"}
    for library in ("qgalore", "peft_pretraining"):
        files = [*(ROOT / library).rglob("*.py"), ROOT / library / "py.typed"]
        expected |= {name: name for name in (path.relative_to(ROOT).as_posix() for path in files)}
    shipped = [*RECIPES, *(f"configs/{path.name}" for path in (ROOT / "configs").iterdir())]
    assert len(shipped) > 25
    expected |= {f"peft_pretraining/shipped/{name}": name for name in shipped}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert held == expected.keys()
        for name, source in expected.items():
            assert archive.read(name) == (ROOT / source).read_bytes(), name
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert archive.read(entry_points).decode() == "[console_scripts]\nqgalore = peft_pretraining.commands:main\n"


def test_a_registry_would_take_the_wheel(wheel: Path) -> None:
    pytest.importorskip("twine", reason="pip install twine, to check the wheel's description and metadata")
    assert "PASSED" in call([sys.executable, "-m", "twine", "check", "--strict", wheel], wheel.parent)


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    before = files_of(tree)
    sdist = build("sdist", tree, tmp_path / "sdist")
    assert files_of(tree) == before
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


# ---- fresh environments


class Environment:
    """A virtual environment with one package of its own, which finds all others in the environment of the tests."""

    def __init__(self, folder: Path, *install: object) -> None:
        call([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
        self.python = folder / "bin" / "python"
        self.site = Path(
            call([self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
        )
        # A .pth within that folder is not read: an editable install there stays out.
        (self.site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", "--no-index"]
        call([*pip, "--no-build-isolation", "--ignore-installed", *install], folder)

    def qgalore(self, folder: Path, *arguments: object) -> str:
        """Run the installed command in a folder."""
        return call([self.python.with_name("qgalore"), *arguments], folder)

    def modules(self, folder: Path, *names: str) -> list[Path]:
        """The files that modules are imported from."""
        program = "import importlib, sys\nfor name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
        return [Path(line) for line in call([self.python, "-c", program, *names], folder).splitlines()]

    def config(self, folder: Path, name: str) -> Path:
        """The file of a shipped configuration."""
        program = f"from peft_pretraining.models.config_files import shipped_config; print(shipped_config({name!r}))"
        return Path(call([self.python, "-c", program], folder).strip())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("fresh") / "venv", wheel)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.slow
def test_everything_comes_from_the_wheel(installed: Environment, empty: Path) -> None:
    for file in installed.modules(empty, "run_pretrain", "qgalore", "peft_pretraining.commands.pretrain"):
        assert file.is_relative_to(installed.site)
    assert installed.config(empty, "60m") == installed.site / "peft_pretraining/shipped/configs/llama_60m.json"
    version = installed.qgalore(empty, "--version").strip()
    assert f"{version.replace(' ', '-')}.dist-info" in {path.name for path in installed.site.iterdir()}


FLAGS = """--model_config model.json --rank 16 --optimizer q_galore_adamw8bit_per_layer --dtype float32 --device cpu
    --batch_size 4 --total_batch_size 4 --max_length 32 --num_training_steps 6 --warmup_steps 0 --eval_every 3
    --eval_tokens 300 --unset_wandb"""


@pytest.mark.slow
def test_a_fresh_environment_trains_and_uses_the_model(installed: Environment, tmp_path: Path, empty: Path) -> None:
    """Every command, from an empty folder."""
    text = write_text(tmp_path / "text")
    data = ["--dataset", text["dataset"], "--tokenizer", text["tokenizer"]]
    (empty / "model.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    used = set[str]()

    def qgalore(command: str, *arguments: object) -> str:
        used.add(command)
        return installed.qgalore(empty, command, *arguments)

    qgalore("tokenize", *data, "--output_dir", "tokens")
    qgalore("pretrain", *FLAGS.split(), "--dataset", "tokens", "--save_dir", "of_ids")
    qgalore("pretrain", *FLAGS.split(), *data, "--save_dir", "run")
    for name in ("run", "of_ids"):
        lines = [json.loads(line) for line in (empty / name / "metrics.jsonl").read_text().splitlines()]
        assert max(line["update_step"] for line in lines) == 6 and any("eval/loss" in line for line in lines)
    qgalore("export", "run", "exported")
    assert qgalore("generate", "exported", "w1 w2", "--max_tokens", "5", "--device", "cpu").startswith("w1 w2")
    last = next(line for line in reversed(lines) if "eval/loss" in line)["eval/loss"]
    assert f"{math.exp(last):.2f}" in qgalore("evaluate", "of_ids", "--device", "cpu")
    qgalore("plot", "run", "of_ids", "--output", "curves.png")
    assert (empty / "curves.png").read_bytes().startswith(b"\x89PNG")
    qgalore("report", "run")
    assert (empty / "run" / "report.html").is_file()
    assert "60M" in qgalore("plan", "--memory", "12GB", "--model", "60m")
    assert used == COMMANDS.keys()


@pytest.mark.slow
def test_a_shipped_recipe_runs_from_the_wheel(installed: Environment, empty: Path) -> None:
    recipe = installed.site / "peft_pretraining/shipped/scripts/pretrain_c4/simulation/llama_60m.sh"
    command = ["bash", recipe, "--dry_run", "--device", "cpu"]
    assert "Planned memory" in call(command, empty, LAUNCHER=str(installed.python), NO_SETUP="1")
    assert not list(empty.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_reads_the_tree(tree: Path, tmp_path: Path, empty: Path, mode: str) -> None:
    copied = tmp_path / "tree"
    shutil.copytree(tree, copied)
    before = files_of(copied)
    environment = Environment(tmp_path / "venv", "--editable", copied, "--config-settings", f"editable_mode={mode}")
    left = {name.partition("/")[0] for name in files_of(copied) - before}
    assert left == ({"build"} if mode == "strict" else set()), "the links of a strict install are there"
    (program, library) = environment.modules(empty, "run_pretrain", "qgalore")
    assert (program.resolve(), library.resolve()) == (copied / "run_pretrain.py", copied / "qgalore/__init__.py")
    assert environment.config(empty, "7b") == copied / "configs" / "llama_7b.json"
    assert environment.qgalore(empty, "--version").startswith("qgalore ")
