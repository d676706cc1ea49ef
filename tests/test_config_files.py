"""The shipped configurations by short names, in a checkout and in an installed package."""

import shutil
from pathlib import Path

import pytest

from peft_pretraining.models import config_files
from peft_pretraining.models.config_files import shipped_config, shipped_configs, shipped_root

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["60m", "60M", "llama_60m", "LLaMA_60M", "llama_60m.json", "configs/llama_60m.json"])
def test_short_names_find_the_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_config(name) == ROOT / "configs" / "llama_60m.json"


@pytest.mark.parametrize(
    "name", ["", "llama", "61m", "60", "60m.yaml", "gpt_60m", "../configs/llama_60m.json", "llama_"]
)
def test_other_names_find_nothing(name: str) -> None:
    assert shipped_config(name) is None


def test_all_configs_from_the_smallest_to_the_largest() -> None:
    sizes = list(shipped_configs())
    assert (sizes[0], sizes[-1]) == ("9m", "70b") and sizes.index("350m") < sizes.index("1b") < sizes.index("7b")
    assert set(shipped_configs().values()) == set((ROOT / "configs").glob("*.json"))


def test_an_installed_package_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "shipped" / "configs")
    monkeypatch.setattr(config_files, "_IN_WHEEL", tmp_path / "shipped")
    assert shipped_root() == tmp_path / "shipped"
    assert shipped_config("7b") == tmp_path / "shipped" / "configs" / "llama_7b.json"
