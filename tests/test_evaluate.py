"""`qgalore evaluate`: the run's own figures to the bit, transformers' loss of an export, bits a byte by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_pretraining.after_training.trained_model import Origin
from peft_pretraining.commands import evaluate as command
from peft_pretraining.commands.export import export
from peft_pretraining.data.eval_set import TextCount, build_eval_set
from peft_pretraining.data.sources.documents import MemorySource, Share
from peft_pretraining.data.sources.mixture import Mixture
from peft_pretraining.data.tokenizer import Added, Tokenizer
from peft_pretraining.data.tokenizers.files import named_tokenizer
from tests.data.files import write_texts
from tests.data.small_tokenizers import TEXTS, byte_level, write_model
from tests.small_run import SmallRun, flags_of, write_text

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("restored")

PER_LAYER = {**flags_of("q_galore_adamw8bit_per_layer"), "num_training_steps": 4, "average_last": 0.5}
RESULTS = ("loss", "perplexity", "perplexity_official", "tokens")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With the run `text`, its export `exported`, and the run `ids` on token ids."""
    small = SmallRun(tmp_path_factory.mktemp("evaluated"))
    small.run("text", **PER_LAYER, **write_text(small.folder / "c4"))
    export(small.folder / "text", small.folder / "exported", "float32", tokenizer="")
    small.run("ids", **PER_LAYER)
    return small


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    code = command.main([str(run), "--device", "cpu", "--json", *map(str, flags)])
    out, err = capsys.readouterr()
    assert code == 0, err
    results: dict[str, Any] = json.loads(out)
    return results


def of_the_run(small: SmallRun, name: str, kind: str = "eval") -> dict[str, Any]:
    return {key: small.result(name).lines[-1][f"{kind}/{key}"] for key in RESULTS}


@pytest.mark.parametrize("name", ["text", "ids"])
def test_a_runs_own_evaluation_is_repeated_to_the_bit(
    small: SmallRun, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    results = evaluated(capsys, small.folder / name)
    assert {key: results[key] for key in RESULTS} == of_the_run(small, name)
    averaged = evaluated(capsys, small.folder / name, "--averaged")
    assert {key: averaged[key] for key in RESULTS} == of_the_run(small, name, "eval_averaged")
    assert averaged["loss"] != results["loss"]


FORMS: dict[str, dict[str, object]] = {
    "int4": flags_of("q_galore_adamw8bit") | {"weight_bits": 4},
    "int8_products": flags_of("q_galore_adamw8bit") | {"int8_products": True, "weight_group_size": None},
    "bfloat16": flags_of("q_galore_adamw8bit") | {"dtype": "bfloat16"},
    "galore": flags_of("galore_adamw"),
    "full": flags_of("adamw"),
    "simulation": flags_of("q_galore_adamw8bit") | {"simulation": True},
    "hf": flags_of("adamw") | {"use_hf_model": True},
}
IN_THE_GATE = ("int4", "galore")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in IN_THE_GATE else pytest.mark.slow) for n in FORMS])
def test_to_the_bit_in_each_form_of_the_weights(small: SmallRun, capsys: pytest.CaptureFixture[str], name: str) -> None:
    small.run(name, **FORMS[name] | {"num_training_steps": 2})
    results = evaluated(capsys, small.folder / name)
    assert {key: results[key] for key in RESULTS} == of_the_run(small, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_to_the_bit_on_a_gpu(small: SmallRun, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    small.run(f"gpu-{dtype}", **PER_LAYER | {"device": "cuda", "dtype": dtype})
    for kind, flags in (("eval", ()), ("eval_averaged", ("--averaged",))):
        results = evaluated(capsys, small.folder / f"gpu-{dtype}", "--device", "cuda", *flags)
        assert {key: results[key] for key in RESULTS} == of_the_run(small, f"gpu-{dtype}", kind)


def test_the_commit_of_a_data_set_is_that_of_the_run(small: SmallRun) -> None:
    flags = {"dataset": "some/set", "data": {"order": {"dataset_revision": "abc"}}, "text_column": "body"}
    origin = Origin(small.folder, {}, flags, 4)
    for argv, revision, column in (
        ([], "abc", "body"),
        (["--dataset_revision", "def"], "def", "body"),
        (["--dataset", "some/other"], "", ""),
    ):
        data = command.asked_of(origin, *command.parse_args(["run", *argv])).data
        assert (data.dataset_revision, data.text_column) == (revision, column)


def test_held_out_documents_are_those_of_the_run_and_another_file_is_taken_whole(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
    texts = [f"w{i} w{i + 1} w{i % 7}" for i in range(90)]
    write_texts(tmp_path / "own.jsonl", texts)
    small.run(
        "held", num_training_steps=1, dataset=tmp_path / "own.jsonl", tokenizer=small.folder / "c4" / "tokenizer.json"
    )
    expected = of_the_run(small, "held")
    results = evaluated(capsys, small.folder / "held")
    assert {key: results[key] for key in RESULTS} == expected and results["documents"] == 9
    write_texts(tmp_path / "own.jsonl", [*texts, *(f"w{i} w{i + 2}" for i in range(100))])
    results = evaluated(capsys, small.folder / "held")
    assert {key: results[key] for key in RESULTS} == expected
    write_texts(tmp_path / "other.jsonl", texts[:5])
    other = evaluated(capsys, small.folder / "held", "--dataset", tmp_path / "other.jsonl")
    assert (other["documents"], other["tokens"]) == (5, 15)
    part = evaluated(capsys, small.folder / "held", "--dataset", tmp_path / "other.jsonl", "--max_tokens", "4")
    assert (part["documents"], part["tokens"]) == (2, 6)


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_an_exports_loss_is_that_of_transformers(
    small: SmallRun, capsys: pytest.CaptureFixture[str], packing: str
) -> None:
    flags = ("--dataset", small.folder / "c4", "--packing", packing, "--max_length", "32", "--eval_tokens", "0")
    results = evaluated(capsys, small.folder / "exported", *flags)
    tokenizer = transformers.AutoTokenizer.from_pretrained(small.folder / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(small.folder / "exported")
    with gzip.open(small.folder / "c4" / "c4-validation.00000-of-00001.json.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    ids = [[*tokenizer(text).input_ids, 1] for text in texts]
    if packing == "pad":
        rows = [[*row[:31], 1] if len(row) > 32 else row for row in ids]
    else:
        joined = [token for row in ids for token in row]
        rows = [joined[i : i + 32] for i in range(0, len(joined), 32)]
    nats = tokens = 0.0
    for row in rows:
        batch = torch.tensor([row])
        with torch.no_grad():
            nats += float(model(batch, labels=batch).loss) * (len(row) - 1)
        tokens += len(row) - 1
    assert results["tokens"] == tokens and results["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert results["documents"] == len(texts)
    same = evaluated(capsys, small.folder / "text", *flags)
    assert same["loss"] == pytest.approx(results["loss"], rel=1e-4)


def test_bits_a_byte_of_whole_documents(small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["w1 w2  w3", "w4\nw5", "w6 naïve"]  # white space that the tokenizer drops, and an unknown word
    write_texts(tmp_path / "texts.jsonl", texts)
    results = evaluated(capsys, small.folder / "text", "--dataset", tmp_path / "texts.jsonl")
    text_bytes = sum(len(text.encode()) for text in texts)
    assert (results["documents"], results["text_bytes"], results["tokens"]) == (3, text_bytes, 7)
    # Nothing predicts w1, w4 and w6.
    assert results["bits_per_byte"] == pytest.approx(results["loss"] * 7 / math.log(2) / (text_bytes - 6), rel=1e-12)
    assert (
        command.main([str(small.folder / "text"), "--device", "cpu", "--dataset", str(tmp_path / "texts.jsonl")]) == 0
    )
    out = capsys.readouterr().out
    assert f"perplexity           {results['perplexity']:.4f}" in out and "text                 23 bytes" in out
    assert f"bits a byte          {results['bits_per_byte']:.5f}" in out


def counted(tokenizer: Tokenizer, source: Any, packing: str, max_length: int, eval_tokens: int = 0) -> TextCount:
    count = TextCount()
    eval_set = build_eval_set(
        dataset="test", tokenizer=tokenizer, packing=packing, max_length=max_length, eval_batch_size=4,
        eval_tokens=eval_tokens, source=source, count=count,
    )  # fmt: skip
    list(eval_set)
    return count


def test_the_text_of_rows_that_cut_documents(tmp_path: Path) -> None:
    byte_level(["<pad>", "</s>", "<s>"]).save(str(tmp_path / "tokenizer.json"))
    lossless = named_tokenizer(str(tmp_path / "tokenizer.json"), Added(bos=True))
    model = named_tokenizer(
        str(write_model(tmp_path / "unigram", "unigram", "spiece.model", remove_extra_whitespaces=True))
    )
    texts = [" ".join(TEXTS[i : i + 9]) for i in range(0, 180, 9)] + [TEXTS[0]]
    for tokenizer in (lossless, model):
        whole = counted(tokenizer, MemorySource("m", texts), "pack", 48)
        assert whole.documents == 21
        assert whole.text_bytes == pytest.approx(sum(len(text.encode()) for text in texts), abs=3)
        cut = counted(tokenizer, MemorySource("m", texts), "pad", 48)
        expected = 0
        for text in texts:
            (ids,) = tokenizer.encode_documents([text], 48)
            expected += len(tokenizer.decode([ids])[0].strip().encode())
        assert cut.documents == 21 and cut.text_bytes == pytest.approx(expected, abs=21)
    sources = [MemorySource("a", texts), MemorySource("b", ["naïve – “北京” " * 20, *TEXTS[200:]])]
    both = counted(lossless, Mixture("m", tuple(Share(each, 0.5) for each in sources)), "pack", 48, eval_tokens=470)
    each = [counted(lossless, source, "pack", 48, eval_tokens=235) for source in sources]
    assert both.documents == sum(count.documents for count in each) < 21
    assert both.text_bytes == pytest.approx(sum(count.text_bytes for count in each))


def test_token_ids_have_the_text_of_their_tokenizer(
    small: SmallRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft_pretraining.commands import tokenize

    tokenizer = str(small.folder / "c4" / "tokenizer.json")
    assert (
        tokenize.main(["--dataset", str(small.folder / "c4"), "--tokenizer", tokenizer, "--output_dir", str(tmp_path)])
        == 0
    )
    of_text = evaluated(capsys, small.folder / "text", "--packing", "pack", "--eval_tokens", "0")
    of_ids = evaluated(capsys, small.folder / "text", "--dataset", tmp_path, "--eval_tokens", "0")
    assert of_ids["loss"] == of_text["loss"] and of_ids["documents"] == of_text["documents"]
    assert of_ids["bits_per_byte"] == pytest.approx(of_text["bits_per_byte"], rel=0.01)
    unknown = evaluated(capsys, small.folder / "ids")
    assert unknown["bits_per_byte"] is None and unknown["documents"] is None


def test_bad_input_is_named(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: object) -> str:
        assert command.main([*map(str, argv), "--device", "cpu"]) == 2
        return capsys.readouterr().err

    assert "exported has recorded no data: give --dataset" in error(small.folder / "exported")
    text = small.folder / "text"
    wrong = error(text, "--max_length", "1", "--eval_tokens", "few", "--eval_batch_size", "0", "--packing", "tight")
    for sentence in (
        "--max_length is 1, it must be at least 2",
        "--eval_tokens is 'few', it must be a number",
        "--eval_batch_size is 0, it must be at least 1",
        "--packing is 'tight', it must be one of pad, pack",
    ):
        assert sentence in wrong
    assert "--max_length is 65, but" in error(text, "--max_length", "65")
    assert "is neither c4 nor" in error(text, "--dataset", small.folder / "nowhere")
    assert "--averaged: " in error(small.folder / "exported", "--averaged", "--dataset", small.folder / "c4")
    large = json.loads((small.folder / "c4" / "tokenizer.json").read_text())
    large["model"]["vocab"] |= {f"more{i}": 203 + i for i in range(100)}
    (small.folder / "large.json").write_text(json.dumps(large))
    flags = ("--dataset", small.folder / "c4", "--tokenizer", small.folder / "large.json")
    assert "--tokenizer yields ids up to 302" in error(small.folder / "exported", *flags)
