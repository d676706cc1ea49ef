"""The examples of docs/guide/trainers*.md, run as they stand, but for a smaller model and rank."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from qgalore import LowRankLinear
from tests.small_run import ROOT

NAMES = ("trainers.md", "trainers_hugging_face.md", "trainers_more.md", "trainers_saving.md")
PAGES = [ROOT / "docs" / "guide" / name for name in NAMES]
"""The first one has the lines with which all examples begin."""
VOCABULARY, ROWS, LENGTH = 64, 8, 8
NEEDED = {
    "Hugging Face's Trainer": ["accelerate"],
    "accelerate": ["accelerate"],
    "Lightning": ["lightning"],
    "axolotl": ["accelerate", "axolotl.integrations.base"],
    "unsloth": ["unsloth", "trl"],
}
"""Packages of a section; those that the development environment lacks were there when the page was written."""


ELSEWHERE = ("Save the model", "Scripts written for galore-torch")
"""Sections without training."""


def sections() -> dict[str, str]:
    """The code of each section of the pages by its heading, the first lines of the first page before it."""
    parts = [re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE) for page in PAGES]
    found = {}
    for text in [f"start\n{parts[0][0]}", *(section for _, *sections in parts for section in sections)]:
        code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
        found[text.splitlines()[0]] = code.replace("rank=128", "rank=4")
    begin = found.pop("start")
    return {heading: f"{begin}\n{code}" for heading, code in found.items()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model and a tokenizer; what accelerate keeps for the process is put back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "my_model")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "my_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with accelerate_state():
        yield tmp_path


@contextlib.contextmanager
def accelerate_state() -> Iterator[None]:
    def reset() -> None:
        module = sys.modules.get("accelerate.state")
        if module is not None:
            module.AcceleratorState._reset_state()
            module.GradientState._reset_state()

    reset()
    yield
    reset()


def data() -> dict[str, Any]:
    """What the page takes for given: rows, batches and texts."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return {"dataset": rows, "loader": DataLoader(rows, batch_size=2)}


def run(heading: str) -> dict[str, Any]:
    names = data()
    begin, line, rest = re.split(r"^(optimizer = .*)$", sections()[heading], maxsplit=1, flags=re.MULTILINE)
    exec(f"{begin}{line}", names)
    names["before"] = {n: m.weight.clone() for n, m in names["model"].named_modules() if isinstance(m, LowRankLinear)}
    exec(rest, names)
    return names


def needs(heading: str) -> None:
    """Skip without the packages of a section."""
    for package in NEEDED.get(heading, []):
        if package == "unsloth" and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
        elif package != "unsloth":  # which changes transformers as soon as it is imported
            pytest.importorskip(package)


def test_the_page_has_a_section_for_each_trainer() -> None:
    assert {*NEEDED, "A loop of your own", "torch.distributed.checkpoint", *ELSEWHERE} == sections().keys()


@pytest.mark.parametrize("heading", [each for each in sections() if each not in ("axolotl", "unsloth", *ELSEWHERE)])
def test_each_example_trains(heading: str, place: Path) -> None:
    needs(heading)
    names = run(heading)
    # The second Trainer of that section has a model of its own.
    models = [names["model"], names["trainer"].model] if heading == "Hugging Face's Trainer" else [names["model"]]
    for model in models:
        layers = {n.removeprefix("module."): m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
        assert layers.keys() == names["before"].keys() and len(layers) == 7
        if heading != "torch.distributed.checkpoint":
            for name, before in names["before"].items():
                assert not torch.equal(layers[name].weight, before), name
    if "norm" in names:
        assert float(names["norm"]) > 0


def test_what_is_saved_is_a_float_model(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = run("Save the model")["model"].eval()
    tokens = torch.arange(LENGTH)[None]
    loaded = AutoModelForCausalLM.from_pretrained("floats", dtype=torch.bfloat16).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    size = sum(param.numel() for param in loaded.parameters()) * 2
    assert size < (place / "floats" / "model.safetensors").stat().st_size < 1.3 * size, "floats alone"


def test_scripts_for_galore_torch(place: Path) -> None:
    """In a process of its own: the modules stay."""
    code = sections()["Scripts written for galore-torch"].partition("optimizer = ")[2].partition("\n")[2]
    program = f"{code}\nfrom galore_torch import GaLoreAdamW8bit, GaLoreAdafactor\nprint(GaLoreAdafactor.__module__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.startswith("qgalore."), done.stderr


def test_the_plugin_for_axolotl(place: Path) -> None:
    needs("axolotl")
    from axolotl.integrations.base import PluginManager
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    names = run("axolotl")
    manager = PluginManager.get_instance()
    manager.plugins["my_module.QGaLore"] = names["QGaLore"]()
    model = AutoModelForCausalLM.from_pretrained("my_model")
    manager.post_model_build({}, model)
    args = TrainingArguments("out", per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2)
    callbacks = manager.add_callbacks_pre_trainer({}, model)
    trainer = Trainer(model, args, train_dataset=names["dataset"], callbacks=callbacks)
    manager.post_trainer_create({}, trainer)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.clone()
    trainer.train()
    assert not torch.equal(weight, before) and trainer.state.log_history[0]["grad_norm"] > 0
    # axolotl's Trainer passes its training arguments to a factory.
    factory, kwargs = trainer.optimizer_cls_and_kwargs
    assert factory()(model, trainer.args, **kwargs).param_groups[0]["lr"] == 1e-2


def test_the_example_for_unsloth(place: Path) -> None:
    """In a process of its own: unsloth changes transformers."""
    needs("unsloth")
    program = f"""
import unsloth
from datasets import Dataset
texts = Dataset.from_dict({{"text": [" ".join(f"w{{i * k % 60}}" for k in range(12)) for i in range(8)]}})
{sections()["unsloth"]}
norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
assert len(norms) == 6 and min(norms) > 0, norms
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "UNSLOTH_COMPILE_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
