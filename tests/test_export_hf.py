"""The export loads in transformers and computes what the trained model does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_pretraining.build import build_model
from peft_pretraining.checkpoint.store import save_checkpoint
from peft_pretraining.commands import export as export_command
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import low_rank_names
from peft_pretraining.models.llama.modeling import LlamaForCausalLM
from qgalore import WeightFormat, convert_linears

transformers = pytest.importorskip("transformers")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 120,
    "hidden_size": 40,
    "intermediate_size": 91,  # odd: at 4 bits the last byte of a row holds one code
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return export_command


def write_run(
    folder: Path, bits: int | None = 8, group_size: int = 32, dtype: str = "bfloat16", **config: object
) -> tuple[LlamaForCausalLM, Path]:
    """A model and its checkpoint."""
    path = folder / "model.json"
    path.write_text(json.dumps({**CONFIG, **config}))
    model = build_model(ModelArgs(str(path), dtype=dtype), seed=4)
    convert_linears(model, low_rank_names(model), WeightFormat(bits, group_size))
    state = {"model_config": str(path), "weight_bits": bits or 8, "weight_group_size": group_size}
    return model, save_checkpoint(folder / "run", 7, model.state_dict(), {}, state)


def tokens() -> torch.Tensor:
    return torch.randint(0, 120, (2, 11), generator=torch.Generator().manual_seed(0))


def float_copy(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """The model with every matrix dequantized to float32."""
    copy = build_model(ModelArgs(str(folder / "model.json"), dtype="float32"))
    state = {name: tensor.float() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in low_rank_names(model):
        state[f"{name}.weight"] = model.get_submodule(name).dequantized_weight(torch.float32)
    copy.load_state_dict({name: tensor for name, tensor in state.items() if "weight_" not in name})
    return copy


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_float32_export_has_the_logits_of_the_dequantized_model(
    tmp_path: Path, script: ModuleType, bits: int | None, tied: bool
) -> None:
    model, checkpoint = write_run(tmp_path, bits, tie_word_embeddings=tied)
    script.export(checkpoint, tmp_path / "out", "float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    expected = float_copy(model, tmp_path)(tokens()).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


@pytest.mark.parametrize("config", [{"rope_scaling": LLAMA_3_1, "attention_bias": True}, QWEN2], ids=["3.1", "qwen2"])
def test_scaled_positions_and_biases_are_exported(tmp_path: Path, script: ModuleType, config: dict[str, Any]) -> None:
    model, _ = write_run(tmp_path, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()  # zero so far
    state = {"model_config": str(tmp_path / "model.json"), "weight_bits": 8, "weight_group_size": 32}
    checkpoint = save_checkpoint(tmp_path / "biased", 7, model.state_dict(), {}, state)
    script.export(checkpoint, tmp_path / "out", "float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [type(loaded).__name__] == (CONFIG | config)["architectures"]
    expected = float_copy(model, tmp_path)(tokens()).logits
    torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_export_has_the_trained_model_to_the_bit(tmp_path: Path, script: ModuleType) -> None:
    model, checkpoint = write_run(tmp_path)
    script.export(checkpoint, tmp_path / "out", "bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    state = loaded.state_dict()
    for name in low_rank_names(model):
        assert torch.equal(state[f"{name}.weight"], model.get_submodule(name).dequantized_weight(torch.bfloat16))
    difference = (loaded(tokens()).logits.float() - model(tokens()).logits.float()).abs().max()
    assert difference < 0.15  # the rotation rounds elsewhere


def test_weights_of_products_in_int8_are_read_as_one_group_a_row(tmp_path: Path, script: ModuleType) -> None:
    write_run(tmp_path)
    model = build_model(ModelArgs(str(tmp_path / "model.json")), seed=4)
    convert_linears(model, low_rank_names(model), WeightFormat(bits=8, int8_products=True))
    flags = {"weight_bits": 8, "weight_group_size": 16, "int8_products": True}
    state = {"model_config": str(tmp_path / "model.json")} | flags
    checkpoint = save_checkpoint(tmp_path / "quantized", 7, model.state_dict(), {}, state)
    script.export(checkpoint, tmp_path / "out", "bfloat16")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in low_rank_names(model):
        assert torch.equal(exported[f"{name}.weight"], model.get_submodule(name).dequantized_weight(torch.bfloat16))


def test_shards(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model, checkpoint = write_run(tmp_path)
    monkeypatch.setattr(script, "SHARD_BYTES", 20_000)
    script.export(checkpoint, tmp_path / "out", "float32")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = float_copy(model, tmp_path)(tokens()).logits
    torch.testing.assert_close(loaded(tokens()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_hugging_face_model_comes_back(tmp_path: Path, script: ModuleType, bits: int | None) -> None:
    """--use_hf_model saves the same keys."""
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIG))
    model = build_model(ModelArgs(str(path), use_hf_model=True, dtype="float32"))
    convert_linears(model, low_rank_names(model), WeightFormat(bits, 16))
    flags = {"weight_bits": bits, "weight_group_size": 16, "use_hf_model": True}
    checkpoint = save_checkpoint(tmp_path / "run", 1, model.state_dict(), {}, {"model_config": str(path)} | flags)
    script.export(checkpoint, tmp_path / "out", "float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, script: ModuleType) -> None:
    _, checkpoint = write_run(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"does not fit the model config: .* has no module model\.layers\.1"):
        script.export(checkpoint, tmp_path / "out", "float32")
    (tmp_path / "model.json").write_text(json.dumps(CONFIG | {"intermediate_size": 90}))
    with pytest.raises(UserError, match="do not fit 40 x 90 codes in groups of 32"):
        script.export(checkpoint, tmp_path / "out", "float32")


def test_tokenizer_goes_along(tmp_path: Path, script: ModuleType) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "hello": 3, "world": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "own.json"))
    _, checkpoint = write_run(tmp_path)
    script.export(checkpoint, tmp_path / "out", "bfloat16", tmp_path / "own.json")
    script.export(checkpoint, tmp_path / "again", "bfloat16", tmp_path / "out")
    for folder in ("out", "again"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer("hello world")["input_ids"] == [3, 4]
        assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")


def test_config_kept_in_the_checkpoint_wins_over_the_path(tmp_path: Path, script: ModuleType) -> None:
    model, _ = write_run(tmp_path)
    state = {"model_config": "gone.json", "weight_bits": 8, "weight_group_size": 32}
    without = save_checkpoint(tmp_path / "run", 8, model.state_dict(), {}, state)
    with pytest.raises(UserError, match=r"gone.json, which is not here: give it as --model_config"):
        script.export(without, tmp_path / "out", "bfloat16")
    script.export(without, tmp_path / "given", "bfloat16", model_config=tmp_path / "model.json")
    kept = save_checkpoint(tmp_path / "run", 9, model.state_dict(), {}, state | {"model_config_contents": CONFIG})
    script.export(kept, tmp_path / "kept", "bfloat16")
    assert (tmp_path / "given" / "config.json").read_text() == (tmp_path / "kept" / "config.json").read_text()


def test_refusals_leave_nothing_behind(tmp_path: Path, script: ModuleType) -> None:
    model, checkpoint = write_run(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="exists already"):
        script.export(checkpoint, tmp_path / "run", "bfloat16")
    with pytest.raises(UserError, match="no such file or directory"):
        script.export(checkpoint, tmp_path / "out", "bfloat16", tmp_path / "absent")
    with pytest.raises(UserError, match=r"step_00000001: there is no such folder. Give a run's"):
        script.export(tmp_path / "run" / "step_00000001", tmp_path / "out", "bfloat16")
    wrong = {"model_config": str(tmp_path / "model.json"), "weight_bits": 8, "weight_group_size": 16}
    other = save_checkpoint(tmp_path / "run", 8, model.state_dict(), {}, wrong)
    with pytest.raises(UserError, match="do not fit 40 x 91 codes in groups of 16"):
        script.export(other, tmp_path / "out", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_of_a_run_the_newest_checkpoint_is_taken(tmp_path: Path, script: ModuleType) -> None:
    _, checkpoint = write_run(tmp_path)
    older = checkpoint.with_name("step_00000001")
    shutil.copytree(checkpoint, older)
    (older / "model.safetensors").unlink()
    script.export(checkpoint.parent, tmp_path / "of_run", "float32")
    script.export(checkpoint, tmp_path / "of_step", "float32")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("of_run", "of_step"))
    assert first == second


def test_command_line(tmp_path: Path, root: Path) -> None:
    _, checkpoint = write_run(tmp_path)
    command = [sys.executable, str(root / "scripts" / "export_hf.py"), str(checkpoint), str(tmp_path / "out")]
    command.append("--no-tokenizer")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
