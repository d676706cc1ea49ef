"""A run, a checkpoint and an export are opened as they were trained: model, tokenizer, length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from peft_pretraining.after_training.trained_model import open_trained
from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
from peft_pretraining.build import build_training
from peft_pretraining.checkpoint.store import save_checkpoint
from peft_pretraining.config.parse import parse_args
from peft_pretraining.data.tokenizer import Added
from peft_pretraining.errors import UserError
from qgalore.layer.linear import LowRankLinear
from tests.small_run import SmallRun, flags_of, write_text

transformers = pytest.importorskip("transformers")

Q_GALORE = {**flags_of("q_galore_adamw8bit_per_layer"), "num_training_steps": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """With the runs `tokens` and `text`, both of quantized weights."""
    small = SmallRun(tmp_path_factory.mktemp("trained"))
    small.run("tokens", **Q_GALORE)
    small.run("text", **Q_GALORE, **write_text(small.folder / "c4"), save_every=1)
    return small


def ids() -> torch.Tensor:
    return torch.randint(0, 256, (2, 19), generator=torch.Generator().manual_seed(0))


def test_a_run_is_its_newest_checkpoint_with_codes(small: SmallRun) -> None:
    trained = open_trained(small.folder / "tokens", "cpu")
    assert (trained.update_step, trained.run, trained.trained_length, trained.longest) == (
        2,
        small.folder / "tokens",
        32,
        64,
    )
    layers = [module for module in trained.model.modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == 7 and all(layer.quantized_weight is not None for layer in layers)
    assert not trained.model.training
    args = parse_args(small.argv("tokens", Q_GALORE))
    model, _ = build_training(args, torch.device("cpu"))
    model.load_state_dict(small.result("tokens").checkpoint().model_tensors)
    with torch.no_grad():
        assert torch.equal(trained.model(ids()).logits, model.eval()(ids()).logits)
    older = open_trained(small.folder / "text" / "step_00000001", "cpu")
    assert older.update_step == 1


def test_in_transformers_it_computes_the_same(small: SmallRun) -> None:
    trained = open_trained(small.folder / "tokens", "cpu")
    network = trained.in_transformers()
    assert type(network).__name__ == "LlamaForCausalLM" and not network.training
    with torch.no_grad():
        expected = trained.model(ids()).logits
        torch.testing.assert_close(network(ids()).logits, expected, atol=1e-4, rtol=1e-4)
    half = open_trained(small.folder / "tokens", "cpu", dtype="bfloat16")
    assert half.in_transformers().dtype == torch.bfloat16


def test_the_tokenizer_is_the_one_that_the_run_named(small: SmallRun, tmp_path: Path) -> None:
    trained = open_trained(small.folder / "text", "cpu")
    tokenizer = tokenizer_of(trained)
    assert tokenizer.encode(["w0 w7"]) == [[3, 10]] and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)
    other = json.loads((small.folder / "c4" / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    vocabulary["w0"], vocabulary["w7"] = vocabulary["w7"], vocabulary["w0"]
    vocabulary["<unk>"], vocabulary["w1"] = vocabulary["w1"], vocabulary["<unk>"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"^--tokenizer .*other.json: it gives other ids than the one that .*text"):
        tokenizer_of(trained, str(tmp_path / "other.json"))
    assert tokenizer_of(trained, str(tmp_path / "other.json"), Added()).encode(["w0"]) == [[10]]
    with pytest.raises(UserError, match="--tokenizer train:500: the model is trained already"):
        tokenizer_of(trained, "train:500")
    moved = tmp_path / "text"
    shutil.copytree(small.folder / "text", moved)
    for state in moved.glob("step_*/state.json"):
        assert str(small.folder / "c4" / "tokenizer.json") in state.read_text()
    gone = open_trained(moved, "cpu")
    gone.flags["tokenizer"] = str(tmp_path / "gone.json")
    with pytest.raises(UserError, match=r"tokenizer that is not found: --tokenizer .*gone.json.* give it as"):
        tokenizer_of(gone)


def test_without_a_record_the_flag_is_named(small: SmallRun) -> None:
    with pytest.raises(UserError, match=r"--dataset .*tokens, which does not tell its tokenizer; give it as"):
        tokenizer_of(open_trained(small.folder / "tokens", "cpu"))


def test_a_trained_tokenizer_is_taken_from_the_run(small: SmallRun, tmp_path: Path) -> None:
    """Also of token files that were written with one."""
    from tests.data.files import write_texts

    texts = [f"document {i} has the words {' '.join(f'w{i * k % 89}' for k in range(2, 14))}" for i in range(120)]
    write_texts(tmp_path / "text" / "a.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QGALORE_CACHE", str(tmp_path / "cache"))
        from peft_pretraining.commands import tokenize

        config = json.loads(small.config.read_text()) | {"vocab_size": 400}
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = {"model_config": tmp_path / "config.json", "num_training_steps": 1, "tokenizer": "train:400"}
        small.run("own", **flags, dataset=tmp_path / "text")
        argv = ["--dataset", str(tmp_path / "text"), "--tokenizer", "train:400", "--output_dir", str(tmp_path / "ids")]
        assert tokenize.main(argv) == 0
        small.run("ids", **flags | {"tokenizer": None}, dataset=tmp_path / "ids")
        shutil.rmtree(tmp_path / "cache")
        shutil.rmtree(tmp_path / "text")
    encoded = []
    for name in ("own", "ids"):
        tokenizer = tokenizer_of(open_trained(small.folder / name, "cpu"))
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 1, 0)
        encoded.append(tokenizer.encode(["document 5 has w7"])[0])
    assert encoded[0] == encoded[1] and len(encoded[0]) < 12
    shutil.rmtree(small.folder / "own" / "tokenizer")
    with pytest.raises(UserError, match=r"its tokenizer \(train:400\) was trained for it, and is not in its folder"):
        tokenizer_of(open_trained(small.folder / "own", "cpu"))


def test_what_is_no_model_is_refused_in_a_sentence(small: SmallRun, tmp_path: Path) -> None:
    (tmp_path / "running").mkdir()
    (tmp_path / "running" / "metrics.jsonl").write_text("")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    for name, sentence in [
        ("absent", "there is no such folder"),
        ("running", "this run has no checkpoint yet"),
        ("weightless", "it has a config.json and no weights in safetensors"),
        ("", "it holds no checkpoint and no config.json"),
    ]:
        with pytest.raises(UserError, match=f"{sentence}. Give a run's folder, a step_"):
            open_trained(tmp_path / name, "cpu")
    with pytest.raises(UserError, match=r"--averaged: .* its run had no --average_last"):
        open_trained(small.folder / "tokens", "cpu", averaged=True)
    state = {"model_config_contents": json.loads(small.config.read_text()) | {"num_hidden_layers": 2}}
    tensors = small.result("tokens").checkpoint().model_tensors
    save_checkpoint(tmp_path / "other", 1, tensors, {}, {**small.result("tokens").checkpoint().state, **state})
    with pytest.raises(UserError, match="does not fit the model config and flags that it names"):
        open_trained(tmp_path / "other", "cpu")


def test_a_cut_off_export_is_named_by_its_file(small: SmallRun, tmp_path: Path) -> None:
    """Of a shard as well: transformers says only that a header does not fit."""
    folder = tmp_path / "shards"
    model = open_trained(small.folder / "tokens", "cpu").in_transformers()
    model.save_pretrained(folder, max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    open_trained(folder, "cpu")
    files[1].write_bytes(files[1].read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{folder}: {files[1].name} is cut off: .* fetch it again"):
        open_trained(folder, "cpu")
    files[1].write_bytes(b"")
    with pytest.raises(UserError, match=f"{folder}: {files[1].name}"):
        open_trained(folder, "cpu")
