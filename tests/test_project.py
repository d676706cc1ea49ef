"""The house rules that a machine can keep: one-way dependencies, small files, names, one version."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("qgalore", "peft_pretraining")
FILES = sorted(str(path.relative_to(ROOT)) for library in LIBRARIES for path in (ROOT / library).rglob("*.py"))


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """The modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", FILES)
def test_dependencies_run_one_way(name: str) -> None:
    forbidden = {"run_pretrain", "tests", "benchmarks", "scripts"}
    if name.startswith("qgalore"):
        forbidden |= {"peft_pretraining", "datasets", "wandb", "argparse", "tqdm", "tokenizers", "numpy"}
    if name.startswith("qgalore/kernels"):
        inside = {found for found in imports(ROOT / name) if found.startswith("qgalore")}
        assert all(found.startswith("qgalore.kernels") for found in inside), "kernels know nothing of the library"
    assert not packages(imports(ROOT / name)) & forbidden


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("qgalore")])
def test_the_library_needs_torch_alone(name: str) -> None:
    needed = packages(imports(ROOT / name, top_level_only=True)) - set(sys.stdlib_module_names) - {"qgalore"}
    # A Triton file is imported only where Triton is; every other file must do without.
    allowed = {"torch", "triton"} if name.startswith("qgalore/kernels/") else {"torch"}
    assert needed <= allowed


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    lazy = {"datasets", "wandb", "bitsandbytes", "tqdm", "transformers", "matplotlib"}
    assert not packages(imports(ROOT / name, top_level_only=True)) & lazy


def test_arguments_and_metrics_of_a_run_are_read_before_torch() -> None:
    for name in ("args", "arg_groups", "arg_checks", "cli", "errors", "model_config"):
        assert "torch" not in packages(imports(ROOT / "peft_pretraining" / f"{name}.py")), f"{name} must stay light"


@pytest.mark.parametrize("name", [*FILES, "run_pretrain.py"])
def test_files_are_small(name: str) -> None:
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not there")
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines < 400, f"{name} has {lines} lines: split it"


@pytest.mark.parametrize("name", [*FILES, "run_pretrain.py"])
def test_functions_fit_a_screen(name: str) -> None:
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not there")
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{name}: {node.name} has {lines} lines"


def test_no_file_is_a_drawer_for_everything() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [
        path.relative_to(ROOT)
        for folder in (*LIBRARIES, "scripts", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh") and path.stem in banned
    ]
    assert not found


def test_no_copies_by_suffix() -> None:
    pattern = re.compile(r"_(v\d+|fast|new|old|simulate|copy)$")
    assert not [name for name in FILES if pattern.search(Path(name).stem)]


def project() -> dict[str, object]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = table["project"]
    assert isinstance(found, dict)
    return found


def test_the_package_needs_torch_alone() -> None:
    assert project()["dependencies"] == ["torch>=2.11"]


def test_one_version() -> None:
    version = project()["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"
