"""`benchmarks/bench_finetune.py` with two small layers on a CPU: pairs of texts, both parts, and what goes wrong."""

from __future__ import annotations

import csv
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_finetune
from benchmarks.bench_finetune import HALF, Texts, Vocabulary
from tests.finetune_files import offline

for package in ("transformers", "accelerate", "datasets", "peft", "bitsandbytes"):
    pytest.importorskip(package)
METHODS = "full,lora,galore,qlora,q_galore"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path) -> Iterator[None]:
    with offline(tmp_path):
        yield


def documents(lengths: list[int], first: int = 10) -> np.ndarray:
    """Ids that count up, each document ended by 1."""
    parts, begin = [], first
    for length in lengths:
        parts += [np.arange(begin, begin + length), [1]]
        begin += length
    return np.concatenate(parts).astype("<u2")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pairs_follow_each_other_or_come_from_elsewhere() -> None:
    texts = Texts(documents([HALF * 3 + 5, HALF - 1, HALF * 2, HALF * 9, HALF]), eos=1)
    assert texts.document.tolist() == [0] * 3 + [2] * 2 + [3] * 9 + [4]
    assert texts.followed.tolist() == [0, 1, 3, *range(5, 13)]
    assert texts.pieces[1].tolist() == list(range(10 + HALF, 10 + 2 * HALF))
    pairs, follows = texts.pairs(np.tile(texts.followed, 200), 10**6, seed=0)
    assert pairs.shape == (len(texts.followed) * 200, 2, HALF) and 0.45 < follows.mean() < 0.55
    gap = pairs[:, 1, 0].astype(int) - pairs[:, 0, 0]
    assert ((gap == HALF) == (follows == 1)).all()
    assert len(np.unique(gap[follows == 0])) > 5
    first, rest = texts.split(0.5)
    assert not set(texts.document[first]) & set(texts.document[rest]) and len(first) + len(rest) == len(texts.followed)
    rows = Vocabulary(3000).rows(pairs)
    assert rows.shape[1] == 2 * HALF + 4 and rows[0, [0, HALF + 1, HALF + 2, -1]].tolist() == [3000, 3002, 3002, 3002]
    assert rows[0, 1 : HALF + 1].tolist() == pairs[0, 0].tolist()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 24)):
        ids = np.concatenate([[*generator.integers(2, 90, 3 * HALF), 1] for _ in range(count)]).astype("<u2")
        if split == "train":
            (folder / "train.t5.uint16.xz").write_bytes(lzma.compress(ids.tobytes()))
        else:
            ids.tofile(folder / "validation.uint16")
    return folder


def test_quality_of_each_method_and_what_is_there_is_not_repeated(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = f"--tiny --device cpu --tokens {tokens} --pretrained {tmp_path}/roberta --results {tmp_path}/rows.csv"
    argv += " --vocab_size 90 --pretrain_updates 3 --examples 16 --evaluated 12 --epochs 1 --batch 8 --rank 4"
    first = ["--methods", "full,qlora,q_galore", "--rates", "1e-3", "--seeds", "0"]
    assert bench_finetune.main([*argv.split(), *first]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| roberta_tiny")]
    assert len(table) == 3 and "+0.00" in table[0]
    more = [*argv.split(), "--methods", "q_galore", "--rates", "1e-3,3e-3", "--seeds", "0,1"]
    assert bench_finetune.main(more) == 0
    rows = rows_of(tmp_path / "rows.csv")
    assert tuple(rows[0]) == bench_finetune.COLUMNS
    assert [row["method"] for row in rows] == ["full", "qlora", "q_galore", "q_galore", "q_galore"]
    for row in rows:
        assert row["error"] == "" and row["updates"] == "2" and row["pretrain_updates"] == "3", row["error"]
        assert 0 <= float(row["dev_accuracy"]) <= 100 and 0 <= float(row["test_accuracy"]) <= 100
        assert float(row["peak_gb"]) > 0.1 and int(row["state_bytes"]) > 0 and row["commit"]
    full, qlora, q_galore = (int(row["weight_bytes"]) for row in rows[:3])
    assert q_galore < qlora < full
    assert [(row["seed"], row["lr"]) for row in rows[2:4]] == [("0", "0.001"), ("0", "0.003")]
    chosen = max(rows[2:4], key=lambda row: float(row["dev_accuracy"]))
    assert (rows[4]["seed"], rows[4]["lr"]) == ("1", chosen["lr"])
    monkeypatch.setattr(bench_finetune, "tune", lambda *_: pytest.fail("it is there"))
    assert bench_finetune.main(more) == 0
    assert rows_of(tmp_path / "rows.csv") == rows


def test_pretraining_learns(tokens: Path) -> None:
    import transformers

    texts, vocabulary = Texts(bench_finetune.read_ids(tokens, "validation"), 1), Vocabulary(90)
    texts.pieces[:] = 7
    shape = {**bench_finetune.TINY, "max_position_embeddings": vocabulary.pad + 1 + 2 * HALF + 4}
    config = transformers.RobertaConfig(vocab_size=vocabulary.size, pad_token_id=vocabulary.pad, **shape)
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config)
    losses = list(bench_finetune.pretraining_losses(model, texts, vocabulary, 8, 12, lr=1e-2))
    assert losses[0] > 4 and losses[-1] < 2


@pytest.mark.parametrize("model", ["llama_7b", pytest.param("roberta_base", marks=pytest.mark.slow)])
def test_peaks_of_each_method(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for method in METHODS.split(","):
        argv = ["--part", "peaks", "--models", model, "--one", method, "--tiny", "--device", "cpu"]
        assert bench_finetune.main([*argv, "--updates", "2", "--length", "8", "--rank", "4"]) == 0
        found[method] = row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert tuple(row) == bench_finetune.COLUMNS and row["error"] == "" and row["weight_bytes"] > 0
        counted = method == "full" and model == "llama_7b"
        assert (row["peak_gb"] == "") == counted and row["updates"] == (0 if counted else 2)
        assert row["dtype"] == "bfloat16" and row["embeddings"] == ("frozen" if "llama" in model else "trained")
    assert found["full"]["weight_bytes"] == found["galore"]["weight_bytes"] > found["q_galore"]["weight_bytes"]
    argv = ["--part", "peaks", "--models", model, "--one", "q_galore", "--tiny", "--device", "cpu", "--updates", "0"]
    assert bench_finetune.main([*argv, "--length", "8", "--rank", "4"]) == 0
    counted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counted["counted_gb"] == found["q_galore"]["counted_gb"] and counted["peak_gb"] == "", "by count alone"
    assert found["full"]["state_bytes"] == 2 * 2 * found["full"]["trained_values"]
    assert found["qlora"]["state_bytes"] == found["lora"]["state_bytes"]


def test_a_missing_package_is_the_error_of_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    argv = ["--part", "peaks", "--models", "roberta_base", "--one", "lora", "--tiny", "--device", "cpu"]
    assert bench_finetune.main(argv) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = (
        "UserError: --method lora needs the package peft, which is not installed: pip install 'qgalore[baselines]'"
    )
    assert row["error"] == expected

    def in_this_process(method: str, model: str, *_: object) -> dict[str, object]:
        return row | {"method": method, "model": model}

    monkeypatch.setattr(bench_finetune, "in_own_process", in_this_process)
    argv = ["--part", "peaks", "--methods", "lora,qlora", "--results", str(tmp_path / "rows.csv")]
    assert bench_finetune.main(argv) == 0
    assert [each["error"] for each in rows_of(tmp_path / "rows.csv")] == [row["error"]] * 4
    assert "| llama_7b | qlora | UserError: --method lora needs the package peft" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--methods qgalore", "--methods qgalore: there is none of this name; there are full, lora,"),
        ("--part peaks --models 7b", "--models 7b: there is none of this name; there are roberta_base, llama_7b"),
        ("--part quality", "--part quality needs --tokens DIR, the token ids, and --pretrained DIR"),
        ("--rates fast", "--rates fast: give numbers, separated by commas"),
        ("--batch 0", "--batch 0: it must be at least 1"),
        ("--tokens . --pretrained nowhere", "--tokens .: there is no train*.uint16"),
        ("--part peaks --length 513", "--length 513: it must be 8 to 512"),
    ],
)
def test_values_that_cannot_work(argv: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_finetune.main(argv.split()) == 2
    assert f"bench_finetune: {expected}" in capsys.readouterr().err
