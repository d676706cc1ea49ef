"""Fine-tuning for MMLU by each method, on small files in its layout: prompts, labels, what trains, and the figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from peft_pretraining.finetune import mmlu
from peft_pretraining.finetune.methods import Trainee
from tests.finetune_files import offline, save_llama, write_lines, write_mmlu

for package in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes"):
    pytest.importorskip(package)
METHODS = ("full", "lora", "galore", "qlora", "q_galore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `llama` and the questions `mmlu`."""
    folder = tmp_path_factory.mktemp("mmlu")
    save_llama(folder / "llama")
    write_mmlu(folder / "mmlu")
    return folder


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path) -> Iterator[None]:
    with offline(tmp_path):
        yield


def flags(place: Path, run: Path, method: str = "q_galore", **others: Any) -> list[str]:
    given: dict[str, Any] = {
        "method": method,
        "init_from": place / "llama",
        "dataset": place / "mmlu",
        "save_dir": run / "run",
        "results": run / "results.jsonl",
        "device": "cpu",
        "max_length": 48,
        "lr": 1e-3,
        "rank": 4,
        "update_proj_gap": 2,
        "total_batch_size": 8,
        "batch_size": 4,
        **others,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    "method", [pytest.param(x, marks=() if x in ("qlora", "q_galore") else pytest.mark.slow) for x in METHODS]
)
def test_each_method_trains_all_but_embeddings_and_head(
    method: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert mmlu.main(flags(place, tmp_path, method)) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert (row["program"], row["method"], row["updates"], row["metric"]) == ("mmlu", method, 2, "validation accuracy")
    assert 0 <= row["score"] <= 100 and row["mmlu_5shot"] is None
    printed = capsys.readouterr().out.splitlines()[-1]
    assert "measured by lm-eval, which is not installed: pip install lm-eval, then lm_eval --model hf" in printed
    assert "--tasks mmlu --num_fewshot 5" in printed and str(tmp_path / "run" / "model") in printed
    assert ("peft=" in printed) == ("lora" in method)
    before = AutoModelForCausalLM.from_pretrained(place / "llama", dtype=torch.bfloat16)
    in_blocks = sum(p.numel() for n, p in before.named_parameters() if ".layers." in n and p.dim() == 2)
    norms = sum(param.numel() for param in before.parameters() if param.dim() == 1)
    adapters = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    assert row["trained_values"] == (adapters if "lora" in method else in_blocks + norms)
    if "lora" in method:
        assert row["state_bytes"] == 2 * 4 * adapters, "adapters are float32"
        return
    after = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").named_parameters())
    for name, param in before.named_parameters():
        frozen = name in ("model.embed_tokens.weight", "lm_head.weight")
        # In bfloat16 a norm, 1 at first, does not move by 1e-3.
        if "norm" not in name:
            assert torch.equal(param, after[name].to(param.dtype)) == frozen, name


def test_a_question_as_lm_eval_writes_it(place: Path) -> None:
    row = {"question": " w1 w2 ", "subject": "high_school_physics", "choices": ["w3", "w4", "w5", "w6"], "answer": 2}
    text = "w1 w2\nA. w3\nB. w4\nC. w5\nD. w6\nAnswer:"
    head = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert mmlu.prompt(row) == head + text
    assert mmlu.prompt({**row, "subject": ""}) == text
    tokenizer = tokenizer_of(place)
    encoded = mmlu.encode({**row, "subject": ""}, tokenizer, 64)
    ids = encoded["input_ids"]
    assert tokenizer.decode(ids) == "<s> w1 w2 A. w3 B. w4 C. w5 D. w6 Answer: C"
    assert encoded["labels"] == [-100] * (len(ids) - 1) + ids[-1:], "no eos follows the question"
    cut = mmlu.encode(row, tokenizer, 8)
    assert cut["input_ids"] == ids[-8:] and cut["labels"][-1] == ids[-1]


def tokenizer_of(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place / "llama")


def test_a_prediction_is_the_most_probable_letter_before_the_answer() -> None:
    examples = [{"input_ids": [0, 9, 6], "labels": [-100, -100, 6]}, {"input_ids": [0, 8], "labels": [-100, 8]}]
    batch = mmlu.collate(examples, pad=1)
    assert batch["input_ids"].tolist() == [[0, 9, 6], [0, 8, 1]] and batch["attention_mask"].tolist()[1] == [1, 1, 0]
    assert batch["labels"].tolist() == [[-100, -100, 6], [-100, 8, -100]]
    logits = torch.zeros(2, 3, 10)
    logits[0, 1, 6], logits[0, 1, 9], logits[1, 0, 5], logits[1, 1, 8] = 1.0, 2.0, 1.0, 1.0
    letters = [5, 6, 7, 8]
    found = mmlu.predicted(logits, batch["labels"], letters)
    assert found.tolist() == [[1], [0]], "6 and 5; the most probable token of all, 9, is no letter"
    assert mmlu.classes_of(batch["labels"].numpy(), letters) == [1, 3]


def test_lm_eval_is_asked_where_it_is_installed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in of the package, which calls the model as it does."""
    asked: dict[str, Any] = {}

    def evaluate(**given: Any) -> dict[str, Any]:
        asked.update(given)
        model = given["model"].pretrained
        assert not model.training
        with torch.no_grad():
            model(torch.arange(6)[None])
        groups = ("mmlu", "mmlu_stem", "mmlu_social_sciences", "mmlu_humanities", "mmlu_other")
        return {"results": {name: {"acc,none": 0.25} for name in groups}}

    package, models, huggingface = (ModuleType(f"lm_eval{end}") for end in ("", ".models", ".models.huggingface"))
    package.simple_evaluate = evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(mmlu, "find_spec", lambda name: True)
    assert mmlu.main(flags(place, tmp_path, num_training_steps=1, eval_limit=7)) == 0
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["mmlu"], 5, 7)
    assert capsys.readouterr().out.splitlines()[-1] == "MMLU with 5 examples: 25.0"
    assert json.loads((tmp_path / "results.jsonl").read_text())["mmlu_5shot"]["mmlu_stem"] == 25.0
    monkeypatch.setenv("RANK", "1")
    assert mmlu.measure(Trainee(torch.nn.Linear(2, 2)), None, 0, 1) is None, "the first rank asks"


def test_the_defaults_are_alike_for_every_method() -> None:
    method, tuning = mmlu.MmluMethodArgs(), mmlu.MmluTuningArgs()
    assert (method.embeddings, method.dtype, method.activation_checkpointing) == ("frozen", "bfloat16", True)
    assert (method.rank, method.lora_alpha, method.update_proj_gap, method.svd_method) == (8, 32, 500, "randomized")
    assert (tuning.init_from, tuning.dataset) == ("meta-llama/Meta-Llama-3-8B", "cais/mmlu")
    assert (tuning.lr, tuning.epochs, tuning.total_batch_size, tuning.max_length) == (2e-5, 1.0, 16, 512)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"total_batch_size": 0}, "--total_batch_size is 0, it must be at least 1"),
        ({"embeddings": "no"}, "--embeddings is 'no', it must be one of trained, frozen"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere: there is no such folder"),
        ({"max_length": 99}, "--max_length 99: the tokenizer of"),
    ],
)
def test_bad_input_is_a_sentence(
    changed: dict[str, Any], expected: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmlu.main(flags(place, tmp_path, **changed)) == 2
    assert f"mmlu: {expected}" in capsys.readouterr().err


def test_questions_that_do_not_fit_are_a_sentence(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"question": "w1", "subject": "", "choices": ["w1", "w2", "w3"], "answer": 1}
    for changed, expected in (
        ({}, "question 0 of all/auxiliary_train has 3 choices and the answer 1; there must be 4 choices"),
        ({"choices": ["w1"] * 4, "answer": 4}, "question 0 of all/auxiliary_train has 4 choices and the answer 4;"),
    ):
        write_lines(tmp_path / "own" / "all" / "auxiliary_train.jsonl", [{**row, **changed}])
        assert mmlu.main(flags(place, tmp_path, dataset=tmp_path / "own")) == 2
        assert f"mmlu: --dataset {tmp_path}/own: {expected}" in capsys.readouterr().err
