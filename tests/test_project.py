"""The house rules that a machine can keep: one-way dependencies, short functions, names, one version."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from peft_pretraining.errors import missing_package

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
    if name == "peft_pretraining/commands/pretrain.py":
        forbidden.remove("run_pretrain")
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


OF_ANOTHER_LIBRARY = "peft_pretraining/methods/frozen.py"
"""Its classes are bitsandbytes'."""


@pytest.mark.parametrize("name", FILES)
def test_optional_packages_are_imported_where_they_are_used(name: str) -> None:
    lazy = {
        "accelerate", "datasets", "wandb", "bitsandbytes", "tqdm", "transformers", "matplotlib", "tensorboard", "peft",
        "sklearn", "scipy", "lm_eval",
    }  # fmt: skip
    at_once = imports(ROOT / name, top_level_only=True)
    assert module_name(OF_ANOTHER_LIBRARY) not in at_once
    assert not packages(at_once) & lazy or name == OF_ANOTHER_LIBRARY


def test_a_command_line_is_checked_without_loading_anything_heavy() -> None:
    """Data sources and model families are looked up for it, and must not load what they need later."""
    heavy = "{'torch', 'tokenizers', 'huggingface_hub', 'transformers', 'datasets'}"
    program = f"""
import sys
from peft_pretraining.config.parse import parse_args
parse_args("--model_config configs/llama_60m.json --batch_size 8 --dataset pydocs --optimizer galore_adamw".split())
sys.exit(repr({heavy} & sys.modules.keys()) if {heavy} & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compared_constants(tree: ast.AST) -> set[object]:
    """Constants that `==`, `in` or `match` compares something with."""
    found: set[object] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return found


@pytest.mark.parametrize("name", [*FILES, "run_pretrain.py"])
def test_no_data_set_is_asked_for_by_its_name(name: str) -> None:
    assert not compared_constants(ast.parse((ROOT / name).read_text(encoding="utf-8"))) & {"c4", "pydocs"}


# ---- rooms

ROOMS = [
    "qgalore.torch_internals", "qgalore.seeding", "qgalore.config", "qgalore.recipes", "qgalore.kernels",
    "qgalore.layer", "qgalore.subspace", "qgalore.update", "qgalore.sharding", "qgalore.offload", "qgalore.optimizer",
    "qgalore.graphs", "qgalore.integrations", "qgalore.compat", "qgalore",
    "peft_pretraining.errors", "peft_pretraining.data", "peft_pretraining.models", "peft_pretraining.config",
    "peft_pretraining.methods", "peft_pretraining.optim", "peft_pretraining.accumulation", "peft_pretraining.runtime",
    "peft_pretraining.build", "peft_pretraining.evaluation",
    "peft_pretraining.averaging", "peft_pretraining.speed",
    "peft_pretraining.memory", "peft_pretraining.run_summary", "peft_pretraining.dry_run",
    "peft_pretraining.checkpoint", "peft_pretraining.reporting", "peft_pretraining.finetune",
    "peft_pretraining.after_training", "peft_pretraining", "run_pretrain", "peft_pretraining.commands",
    "peft_pretraining.__main__",
]  # fmt: skip
"""A room may import those that come before it in its library, and never one that comes after it."""


def module_name(name: str) -> str:
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imported_modules(name: str) -> set[str]:
    """The modules of the project that a file imports anywhere, for types alone, too, or inside a function."""
    modules = {module_name(each) for each in FILES}
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            # What is not a module is a name that the package or module itself has.
            found |= inside | ({node.module or ""} if len(inside) < len(node.names) else set())
    return {each for each in found if each.startswith(LIBRARIES)} - {module_name(name)}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module_name(name): imported_modules(name) for name in FILES}
    graph |= {"run_pretrain": imported_modules("run_pretrain.py")}
    left = dict(graph)
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these files import each other in a circle, or one that does: {sorted(left)}"
    assert len(graph) > 100 and graph["qgalore.layer.linear"] and graph["run_pretrain"]


FAMILIES = sorted(path.parent.name for path in (ROOT / "peft_pretraining" / "models").glob("*/family.py"))
ABOUT_LLAMA = {"benchmarks/compare_methods.py"}
"""Its peers run our LLaMA without what is ours."""


def test_nothing_outside_its_folder_imports_a_family_of_models() -> None:
    assert FAMILIES
    others = [path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    names = {*FILES, *(str(path.relative_to(ROOT)) for path in others), "run_pretrain.py"} - ABOUT_LLAMA
    for name in names:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        found = imports(ROOT / name)
        # `from package import module` imports the module, too.
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        for family in FAMILIES:
            if not name.startswith("peft_pretraining/models/"):  # a family may build on another
                package = f"peft_pretraining.models.{family}"
                assert not [x for x in found if x == package or x.startswith(f"{package}.")], name


@pytest.mark.parametrize("name", [*FILES, "run_pretrain.py"])
def test_rooms_import_in_one_direction(name: str) -> None:
    room = room_of(module_name(name))
    for other in map(room_of, imported_modules(name)):
        both = {room.split(".")[0], other.split(".")[0]}
        if len(both) == 1 and other != room:
            assert ROOMS.index(other) < ROOMS.index(room), f"{name} imports {other}, which comes after {room}"


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(module_name(name)) for name in FILES} | {"run_pretrain"} == set(ROOMS)


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


DIALECT = {
    "anchor", "begun", "held", "joined", "lane", "lanes", "message_of", "neighbour", "neighbours", "partly", "place",
    "places", "said", "say", "several", "tap", "taps", "together",
}  # fmt: skip
"""Words for which the field has others (CONTRIBUTING.md)."""
IN_USE = re.compile(r"held_?out|put_in_place|^data_lanes$|^lanes?$", re.IGNORECASE)
"""Held-out documents; the flag `--data_lanes`, which is older; lanes of a processor, in kernels."""


@pytest.mark.parametrize("name", [*FILES, "run_pretrain.py"])
def test_names_are_words_of_the_field(name: str) -> None:
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        for field in ("name", "arg", "id", "attr"):
            if isinstance(identifier := getattr(node, field, None), str) and not IN_USE.search(identifier):
                words = re.sub(r"(?<!^)(?=[A-Z])", "_", identifier).lower().split("_")
                found |= {identifier for word in words if word in DIALECT}
    assert not found, f"{name}: {sorted(found)}"


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


def test_the_packages_of_experiments_are_those_of_the_extras() -> None:
    """exp_requirements.txt is a path of the official repository; pyproject.toml decides."""
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    listed = (ROOT / "exp_requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in listed if not line.startswith("#")] == ["torch>=2.11", *extras["train"], *extras["plot"]]


def test_a_missing_package_is_advice_to_install_its_extra() -> None:
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    for extra in ("train", "plot"):
        for requirement in extras[extra]:
            package = re.split("[>=]", requirement)[0]
            text = missing_package(ModuleNotFoundError(name=f"{package}.inner"))
            assert text == f"needs the package {package}, which is not installed: pip install 'qgalore[{extra}]'"
    for requirement in extras["finetune"][1:]:
        package = re.split("[>=]", requirement)[0].replace("scikit-learn", "sklearn")
        text = missing_package(ModuleNotFoundError(name=package))
        assert text == f"needs the package {package}, which is not installed: pip install 'qgalore[finetune]'"
    assert missing_package(ModuleNotFoundError(name="peft_pretraining.gone")) is None


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{room}" for room in ("explain", "guide", "reference", "results"))]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_files_that_are_there(name: str) -> None:
    files = sorted((ROOT / name).glob("*.md")) if (ROOT / name).is_dir() else [ROOT / name]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    named = re.findall(r"`((?:qgalore|peft_pretraining|scripts|tests|benchmarks|configs|docs)/[\w./]*)`", text)
    assert named and not [path for path in named if not (ROOT / path).exists()]


def test_all_public_names_can_be_imported() -> None:
    import qgalore

    assert sorted(name for names in qgalore._MODULES.values() for name in names) == sorted(qgalore.__all__)
    for name in qgalore.__all__:
        assert getattr(qgalore, name).__module__.startswith("qgalore."), name
    assert set(qgalore.__all__) <= set(dir(qgalore))
    program = "import qgalore; print(qgalore.optimizer.LowRankAdamW, qgalore.kernels.quantize)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'GaLore'"):
        qgalore.GaLore  # noqa: B018


def test_one_version() -> None:
    import qgalore

    version = project()["version"]
    assert qgalore.__version__ == version
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert project()["license"] == "Apache-2.0"
