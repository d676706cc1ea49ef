"""Fine-tuning for GLUE by each method, on small files in its layout: what trains, the row, going on, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.finetune import glue, glue_metrics
from peft_pretraining.finetune.flags import MethodArgs, TuningArgs
from peft_pretraining.finetune.pretrained import load_model, load_tokenizer
from peft_pretraining.finetune.training import TaskData, newest_checkpoint, open_folder
from tests.finetune_files import offline, save_roberta, write_glue, write_lines

for package in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes", "sklearn"):
    pytest.importorskip(package)
METHODS = ("full", "lora", "galore", "qlora", "q_galore")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `roberta` and the tasks in `glue`."""
    folder = tmp_path_factory.mktemp("glue")
    save_roberta(folder / "roberta")
    for name, task in glue.TASKS.items():
        write_glue(folder / "glue", name, task.columns, task.classes, task.validation)
    return folder


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path) -> Iterator[None]:
    with offline(tmp_path):
        yield


def flags(place: Path, run: Path, task: str = "rte", method: str = "q_galore", **others: Any) -> list[str]:
    given: dict[str, Any] = {
        "task": task,
        "method": method,
        "init_from": place / "roberta",
        "dataset": place / "glue",
        "save_dir": run / "run",
        "results": run / "results.jsonl",
        "device": "cpu",
        "max_length": 32,
        "epochs": 1,
        "lr": 1e-3,
        "rank": 4,
        "update_proj_gap": 2,
        **others,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_leaves_its_row(method: str, place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert glue.main(flags(place, tmp_path, method=method)) == 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["task"], row["method"], row["seed"], row["metric"]) == ("rte", method, 0, "accuracy")
    assert row["updates"] == 2 and 0 <= row["score"] <= row["best_score"] <= 100
    assert row["peak_gb"] > 0.1 and row["seconds"] > 0 and row["versions"]["torch"] == torch.__version__
    before = AutoModelForSequenceClassification.from_pretrained(place / "roberta")
    weights = sum(param.numel() for param in before.parameters())
    in_blocks = sum(p.numel() for n, p in before.named_parameters() if ".layer." in n and p.dim() == 2)
    adapters = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 48))
    classifier = 32 * 32 + 32 + 2 * 32 + 2
    if "lora" in method:
        # The classifier is there twice: peft keeps the one that it does not train.
        floats = weights + adapters + classifier - (in_blocks if method == "qlora" else 0)
        assert row["trained_values"] == adapters + classifier
        scales = 4 * 2 * (5 * 32 + 48) if method == "qlora" else 0
        assert row["weight_bytes"] == 4 * floats + (in_blocks + scales if method == "qlora" else 0)
        assert row["state_bytes"] == 2 * 4 * row["trained_values"]
        return
    assert row["trained_values"] == weights
    if method == "q_galore":
        assert in_blocks < row["weight_bytes"] - 4 * (weights - in_blocks) < 1.4 * in_blocks
        assert row["state_bytes"] < 0.6 * 8 * weights
    else:
        assert row["weight_bytes"] == 4 * weights
        assert (row["state_bytes"] == 8 * weights) == (method == "full")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    found = after.roberta.state_dict()
    assert not [name for name, param in before.roberta.named_parameters() if torch.equal(param, found[name])]


@pytest.mark.parametrize("method", ["full", pytest.param("galore", marks=SLOW), pytest.param("q_galore", marks=SLOW)])
def test_frozen_embeddings_stay(method: str, place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    assert glue.main(flags(place, tmp_path, method=method, embeddings="frozen", num_training_steps=1)) == 0
    before = AutoModelForSequenceClassification.from_pretrained(place / "roberta").roberta
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").roberta
    for name, module in before.embeddings.named_modules():
        if isinstance(module, torch.nn.Embedding):
            assert torch.equal(module.weight, after.embeddings.get_submodule(name).weight), name
    assert not torch.equal(before.embeddings.LayerNorm.weight, after.embeddings.LayerNorm.weight)
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["updates"] == 1 and row["trained_values"] < sum(param.numel() for param in before.parameters())


METRICS = {"cola": "matthews", "stsb": "pearson", "mrpc": "f1", "mnli": "accuracy"}


@pytest.mark.parametrize("task", [pytest.param(name, marks=() if name == "mnli" else SLOW) for name in METRICS])
def test_each_metric_on_files_of_its_task(task: str, place: Path, tmp_path: Path) -> None:
    given = flags(place, tmp_path, task, "full", num_training_steps=1)
    assert glue.main(given) == 0
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["metric"] == METRICS[task] and -100 <= row["score"] <= 100
    assert row["flags"]["total_batch_size"] == (32 if task == "cola" else 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.Trainer.train", lambda *_, **__: pytest.fail("it has ended"))
        assert glue.run(given) == row
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 1


def test_the_defaults_are_the_papers() -> None:
    """GaLore, arXiv 2403.03507, table 7 and appendix D.2: rank 8, scale 2."""
    rates = {"sst2": 2e-5, "mrpc": 2e-5, "qqp": 2e-5, "rte": 2e-5, "stsb": 3e-5}
    assert {name: task.lr for name, task in glue.TASKS.items()} == rates | dict.fromkeys(("mnli", "cola", "qnli"), 1e-5)
    assert {task.batch for name, task in glue.TASKS.items() if name != "cola"} == {16}
    method, tuning = MethodArgs(), TuningArgs()
    assert (method.rank, method.galore_scale, method.update_proj_gap, method.svd_method) == (8, 2.0, 500, "full")
    assert (method.lora_alpha, method.lora_dropout, tuning.epochs, tuning.max_length) == (32.0, 0.05, 30.0, 512)
    assert (tuning.init_from, tuning.dataset) == ("FacebookAI/roberta-base", "nyu-mll/glue")


def test_metrics_of_glue_by_hand() -> None:
    right, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 0, 1])
    logits = np.eye(2)[right]
    # 2 true and 1 false positive, 2 true and no false negatives.
    assert glue_metrics.matthews(logits, labels) == pytest.approx(100 * 4 / np.sqrt(3 * 2 * 3 * 2))
    assert glue_metrics.f1(logits, labels) == pytest.approx(100 * 4 / 5)
    assert glue_metrics.accuracy(logits, labels) == pytest.approx(80)
    values = np.array([[1.0], [2.0], [4.0]])
    assert glue_metrics.pearson(values, np.array([1.0, 2.0, 3.0])) == pytest.approx(98.198, 1e-4)
    assert glue_metrics.pearson(np.ones((3, 1)), np.array([1.0, 2.0, 3.0])) == 0


class Stops:
    """Examples whose reading is stopped after some, once."""

    def __init__(self, examples: Any, after: int) -> None:
        self.examples, self.left = examples, after

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.examples[index]


@pytest.mark.parametrize("method", [pytest.param(x, marks=() if x == "q_galore" else SLOW) for x in METHODS])
def test_a_stopped_run_goes_on_to_the_bit(
    method: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"method": method, "total_batch_size": 8, "save_every": 2, "epochs": 2, "batch_size": 4}
    assert glue.main(flags(place, tmp_path / "whole", **given)) == 0
    read = glue.read_task
    with monkeypatch.context() as patch:
        patch.setattr(glue, "read_task", lambda *args: stopping(read(*args), 42))
        with pytest.raises(KeyboardInterrupt):
            glue.main(flags(place, tmp_path / "parts", **given))
    assert newest_checkpoint(tmp_path / "parts" / "run") == tmp_path / "parts" / "run" / "checkpoint-4"
    # One that was being written when the process ended is passed over.
    (tmp_path / "parts" / "run" / "checkpoint-5").mkdir()
    assert glue.main(flags(place, tmp_path / "parts", **given)) == 0
    rows = [json.loads((tmp_path / name / "results.jsonl").read_text()) for name in ("whole", "parts")]
    assert (rows[0]["resumed_at"], rows[1]["resumed_at"]) == (0, 4)
    assert rows[0]["score"] == rows[1]["score"] and rows[0]["updates"] == rows[1]["updates"] == 6
    # One that ended after its last checkpoint and before its row.
    (tmp_path / "parts" / "run" / "result.json").unlink()
    assert glue.run(flags(place, tmp_path / "parts", **given))["score"] == rows[0]["score"]
    whole, parts = (weights_in(tmp_path / name / "run" / "model") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def stopping(data: TaskData, after: int) -> TaskData:
    return dataclasses.replace(data, train=Stops(data.train, after))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(path)
    return found


@SLOW
def test_a_seed_decides(place: Path, tmp_path: Path) -> None:
    """Two runs of one are alike, and another seed's differs."""
    scores = []
    for number, seed in enumerate([1, 1, 2]):
        given = flags(place, tmp_path / str(number), seed=seed, num_training_steps=2)
        assert glue.main(given) == 0
        scores.append(weights_in(tmp_path / str(number) / "run" / "model")["classifier.dense.weight"])
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"task": "rtf"}, "--task is 'rtf', it must be one of cola, stsb,"),
        ({"method": "qgalore"}, "--method is 'qgalore', it must be one of full, lora, galore, qlora, q_galore"),
        ({"rank": 0}, "--rank is 0, it must be at least 1"),
        ({"rank": 64}, "--method q_galore: rank=64 is larger than the projected side of"),
        ({"init_from": "./nowhere"}, "--init_from ./nowhere: there is no such folder"),
        ({"init_from": "nobody/nothing"}, "--init_from nobody/nothing: there is no tokenizer that transformers can"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere: there is no such folder"),
        ({"dataset": "nobody/nothing"}, "--dataset nobody/nothing: rte/train cannot be read ("),
        ({"dataset": "."}, "--dataset .: there is no rte/train.parquet, nor one that ends in -00000-of-00001.parquet"),
        ({"max_length": 65}, "--max_length 65: the tokenizer of"),
        ({"batch_size": 3}, "--batch_size 3: --total_batch_size 16 is not a multiple of it times the 1 rank; give a"),
        ({"device": "cuda"}, "--device cuda: torch sees no CUDA GPU"),
        ({"lora_alfa": 3}, "--lora_alfa is no flag of this program: did you mean --lora_alpha?"),
    ],
)
def test_bad_input_is_a_sentence(
    changed: dict[str, Any], expected: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "device" in changed and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert glue.main(flags(place, tmp_path, **changed)) == 2
    error = capsys.readouterr().err
    assert f"glue: {expected}" in error and "Traceback" not in error
    assert not (tmp_path / "results.jsonl").exists()


def test_files_that_do_not_fit_are_a_sentence(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"sentence1": "w1", "sentence2": "w2", "label": 1}] * 3
    validation = tmp_path / "own" / "rte" / "validation.jsonl"
    write_lines(validation, rows)
    for train, expected in (
        ([{"sentence1": "w1", "label": 1}], "rte/train has no column sentence2; its columns are sentence1, label"),
        ([*rows, {**rows[0], "label": -1}], "rte/train has the label -1 at example 3, and it must be one of 0 to 1"),
        ([], "rte/train cannot be read ("),
    ):
        write_lines(validation.with_name("train.jsonl"), train)
        assert glue.main(flags(place, tmp_path, dataset=tmp_path / "own", save_dir=tmp_path / expected[:12])) == 2
        assert f"glue: --dataset {tmp_path}/own: {expected}" in capsys.readouterr().err
        shutil.rmtree(tmp_path / expected[:12])
    write_lines(validation.with_name("train.csv"), rows)
    assert glue.main(flags(place, tmp_path, dataset=tmp_path / "own")) == 2
    assert "rte/train is there as .csv and .jsonl: keep one" in capsys.readouterr().err


def test_a_folder_of_another_run_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert glue.main(flags(place, tmp_path)) == 2
    assert f"--save_dir {tmp_path}/run: the folder holds something else" in capsys.readouterr().err
    (tmp_path / "run" / "notes.txt").unlink()
    open_folder(tmp_path / "run", {"lr": 1.0, "seed": 0})
    assert open_folder(tmp_path / "run", {"lr": 1.0, "seed": 0, "results": "elsewhere"}) is None
    with pytest.raises(UserError, match=r"there has --lr 1\.0, and here it is 2\.0; give the same flags"):
        open_folder(tmp_path / "run", {"lr": 2.0, "seed": 0})
    (tmp_path / "run" / "result.json").write_text('{"score":')
    assert open_folder(tmp_path / "run", {"lr": 1.0, "seed": 0}) is None, "its writing was interrupted"
    (tmp_path / "run" / "settings.json").write_text("")
    with pytest.raises(UserError, match=r"its settings\.json is damaged; remove the folder"):
        open_folder(tmp_path / "run", {"lr": 1.0, "seed": 0})


def test_a_classifier_of_other_labels_is_replaced_and_other_weights_are_not(place: Path, tmp_path: Path) -> None:
    """As of a model that was fine-tuned for MNLI, and of a config.json of another model."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(place / "roberta", num_labels=3)
    model.save_pretrained(tmp_path / "mnli")
    tokenizer = load_tokenizer(str(place / "roberta"), 16)
    wanted = ("AutoModelForSequenceClassification", str(tmp_path / "mnli"), torch.float32, tokenizer)
    found = load_model(*wanted, num_labels=1)
    assert found.classifier.out_proj.out_features == 1
    before, after = model.state_dict(), found.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("roberta."))
    config = json.loads((tmp_path / "mnli" / "config.json").read_text())
    (tmp_path / "mnli" / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"its weights are of two models: roberta\..* has another shape"):
        load_model(*wanted, num_labels=1)


def test_a_missing_package_is_advice(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Trainer, set_seed  # noqa: F401 - which looks for peft itself when it is imported

    for method, package in (("lora", "peft"), ("qlora", "bitsandbytes"), ("full", "datasets")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert glue.main(flags(place, tmp_path / package, method=method)) == 2
        error = capsys.readouterr().err
        extra = "baselines" if package == "peft" else "train"
        assert f"needs the package {package}, which is not installed: pip install 'qgalore[{extra}]'" in error
