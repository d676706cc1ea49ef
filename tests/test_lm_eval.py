"""lm-eval, the evaluation harness of the field, takes an export: on a task that is made here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining.commands.export import export
from tests.small_run import SmallRun, flags_of, write_text

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
transformers = pytest.importorskip("transformers")

CHOICE = """
task: which_word
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/questions.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXT = """
task: some_text
dataset_path: json
dataset_kwargs: {data_files: {test: "FOLDER/texts.jsonl"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With the run `text` and its export `exported`, and tasks in the folder `tasks`."""
    small = SmallRun(tmp_path_factory.mktemp("lm_eval"))
    flags = {**flags_of("q_galore_adamw8bit_per_layer"), "num_training_steps": 20}
    small.run("text", **flags, **write_text(small.folder / "c4", words=8))
    export(small.folder / "text", small.folder / "exported", "float32", tokenizer="")
    tasks = small.folder / "tasks"
    tasks.mkdir()
    questions = [
        {"question": f"w{i % 8} w{i * 3 % 8}", "choices": ["w1", "w2 w3", "w5"], "answer": i % 3} for i in range(12)
    ]
    texts = [{"text": " ".join(f"w{i * k % 8}" for k in range(5))} for i in range(4)]
    for name, task, lines in (("questions", CHOICE, questions), ("texts", TEXT, texts)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tasks / f"{name}.yaml").write_text(task.replace("FOLDER", str(tasks)))
    return small


def results_of(small: SmallRun, monkeypatch: pytest.MonkeyPatch, cache: Path) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(small.folder / "exported"), "dtype": "float32"},
        tasks=["which_word", "some_text"],
        task_manager=TaskManager(include_path=str(small.folder / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    return found


def test_lm_eval_computes_what_transformers_does(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results_of(small, monkeypatch, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small.folder / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(small.folder / "exported")

    def nats(before: list[int], after: list[int]) -> float:
        """Of the ids `after` behind the ids `before`."""
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="sum"))

    right = 0
    for sample in found["samples"]["which_word"]:
        question = sample["doc"]
        scores = [
            nats(tokenizer(question["question"]).input_ids, tokenizer(choice).input_ids)
            for choice in question["choices"]
        ]
        for score, (given, _) in zip(scores, sample["filtered_resps"], strict=True):
            assert float(given) == pytest.approx(-score, rel=1e-4)
        right += scores.index(min(scores)) == question["answer"]
    assert found["results"]["which_word"]["acc,none"] == pytest.approx(right / 12)
    texts = [json.loads(line)["text"] for line in (small.folder / "tasks" / "texts.jsonl").read_text().splitlines()]
    # It has the eos of the export before a text.
    total = sum(nats([1], tokenizer(text).input_ids) for text in texts)
    bits = total / math.log(2) / sum(map(len, texts))
    assert found["results"]["some_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
