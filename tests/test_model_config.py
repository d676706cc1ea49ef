"""What --model_config can name, and keys of a config.json that nothing reads or that would change the computation."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from peft_pretraining.checkpoint.store import save_checkpoint
from peft_pretraining.config.parse import parse_args
from peft_pretraining.config.run_config import RunArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import build_on_meta
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.config_files import shipped_config, shipped_configs
from peft_pretraining.models.config_source import model_name
from peft_pretraining.models.registry import find_family, read_config
from tests.data.hub_server import DatasetHub, HubRepository, point_at
from tests.small_run import CONFIG


def write(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | changes))
    return path


def parse(model_config: Path | str, *more: str) -> RunArgs:
    common = ["--batch_size", "2", "--max_length", "64", "--dataset", "pydocs"]
    return parse_args(["--model_config", str(model_config), *common, *more])


def test_a_file_a_folder_a_size_and_a_run_name_the_same_model(tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    for step in (1, 2):  # of a run the newest counts
        save_checkpoint(
            tmp_path / "run", step, {}, {}, {"model_config_contents": {**CONFIG, "num_hidden_layers": step}}
        )
    for name in (path, path.parent, tmp_path / "run" / "step_00000001"):
        assert read_config_json(name) == CONFIG
        assert read_config(name).hidden_size == 64 and parse(name).model.model_config == str(name)
    assert read_config_json(tmp_path / "run") == CONFIG | {"num_hidden_layers": 2}
    args = parse("60m", "--optimizer", "q_galore_adamw8bit", "--recipe", "orthogonal")
    assert read_config("60m").hidden_size == 512 and args.subspace.rank == 224


def test_transformers_class_takes_them_too(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = write(tmp_path / "model", model_type="qwen2", num_key_value_heads=1)
    by_file, by_folder = (build_on_meta(name, use_hf_model=True) for name in (path, path.parent))
    assert list(by_file.state_dict()) == list(by_folder.state_dict())
    assert build_on_meta("9m", use_hf_model=True).config.hidden_size == 128


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "repository")
    (tmp_path / "empty").mkdir()
    models = {
        "them/small": HubRepository(tmp_path / "repository"),
        "them/empty": HubRepository(tmp_path / "empty"),
        "them/closed": HubRepository(tmp_path / "repository", gated=True),
    }
    hub = DatasetHub(models)
    point_at(hub, tmp_path / "cache", monkeypatch)
    try:
        args = parse("them/small")
        assert read_config(args.model.model_config).hidden_size == 64
        assert sum("config.json" in path for path in hub.paths) <= 2, "asked for again and again"
        for name, message in {
            "them/empty": "them/empty: there is no such file or folder, and config.json of that model could not",
            "them/nobody": "them/nobody: there is no such file or folder, and the hub",
            "them/closed": "them/closed: it is gated on the hub",
        }.items():
            with pytest.raises(UserError, match=f"--model_config {message}"):
                parse(name)
    finally:
        hub.close()
    assert read_config_json("them/small")["hidden_size"] == 64, "what is in the cache needs no hub"


def test_no_such_model_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", ask)
    for name in ("61m", "none.json", str(tmp_path / "none"), "configs/llama_61m.json"):
        with pytest.raises(UserError, match=r"no such file; give a config\.json.*9m, .*13b"):
            parse(name)
    with pytest.raises(UserError, match=r"a folder without config\.json, and no checkpoint"):
        parse(tmp_path)


def test_a_run_is_called_after_its_model(tmp_path: Path) -> None:
    path = write(tmp_path / "Llama-3.2-1B")
    names = {str(path): "Llama-3.2-1B", str(path.parent): "Llama-3.2-1B", "configs/llama_60m.json": "llama_60m"}
    names |= {"60m": "llama_60m", "meta-llama/Llama-3.2-1B": "Llama-3.2-1B", "runs/mine/step_00000010": "mine"}
    assert {name: model_name(name) for name in names} == names
    folder = parse(path.parent).save_dir(datetime(2026, 11, 29))
    assert folder == Path("checkpoints/Llama-3.2-1B-adam-20261129-000000")


HUGGING_FACES = {
    "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "transformers_version": "4.45.0", "use_cache": True,
    "torch_dtype": "bfloat16", "pretraining_tp": 1, "sliding_window": None, "num_experts": 0, "logits_scaling": 1.0,
    "layer_types": ["full_attention"], "partial_rotary_factor": 1.0, "id2label": {"0": "a"},
}  # fmt: skip


def test_a_key_that_nothing_reads_is_named(tmp_path: Path) -> None:
    assert parse(write(tmp_path, **HUGGING_FACES)).warnings == ()
    (warning,) = parse(write(tmp_path, **HUGGING_FACES, num_key_value_head=1, my_note="x")).warnings
    assert warning.endswith("nothing reads num_key_value_head (is num_key_value_heads meant?), my_note")
    qwen = {"model_type": "qwen2", "num_key_value_heads": 1, "use_sliding_window": False, "sliding_window": 4096}
    assert parse(write(tmp_path, **HUGGING_FACES | qwen, max_window_layers=2, use_mrope=False)).warnings == ()


def test_every_key_of_a_shipped_config_is_read() -> None:
    for path in shipped_configs().values():
        raw = read_config_json(path)
        assert find_family(raw, str(path)).unknown_keys(raw) == {}


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("sliding_window", 4096, "it must be null"),
        ("partial_rotary_factor", 0.5, "it must be 1.0"),
        ("layer_types", ["sliding_attention"], "it must be 'full_attention' for every layer"),
        ("num_local_experts", 8, "it must be 0"),
        ("final_logit_softcapping", 30.0, "it must be null"),
        ("residual_multiplier", 0.22, "it must be 1"),
        ("hidden_dropout", 0.1, "it must be 0"),
    ],
)
def test_a_key_that_changes_the_computation_is_refused(tmp_path: Path, key: str, value: object, right: str) -> None:
    with pytest.raises(UserError, match=f"{key} .*{right}, or pass --use_hf_model"):
        parse(write(tmp_path, **{key: value}))


def test_a_model_that_another_library_has_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantization_config says that the weights are stored in another"):
        parse(write(tmp_path, quantization_config={"bits": 4}))


def test_all_faults_of_a_config_are_named_at_once(tmp_path: Path) -> None:
    """The official Q-GaLore configurations have two: max_sequence_length, and -1 as the id of padding."""
    path, raw = tmp_path / "config.json", read_config_json(shipped_config("60m") or "")
    official = {key: value for key, value in raw.items() if key != "max_position_embeddings"}
    path.write_text(json.dumps(official | {"max_sequence_length": 1024, "pad_token_id": -1}))
    with pytest.raises(UserError) as refused:
        read_config(path)
    assert str(refused.value) == (
        f"{path}: max_sequence_length is the official Q-GaLore code's name; rename it max_position_embeddings. "
        "pad_token_id is -1; it must be null or an id inside the vocabulary, 0 to 31999."
    )
    faults = {"hidden_act": "gelu", "rope_scaling": {"rope_type": "yarn"}, "hidden_size": 500, "rms_norm_eps": 0}
    path.write_text(json.dumps(raw | faults | {"num_key_value_heads": 3}))
    with pytest.raises(UserError) as refused:
        read_config(path)
    found = str(refused.value).split(". ")
    named = ("hidden_act", "rope_scaling", "hidden_size", "rms_norm_eps", "num_key_value_heads")
    assert len(found) == len(named) and all(key in text for key, text in zip(named, found, strict=True))
    del raw["vocab_size"]
    path.write_text(json.dumps(raw | {"mlp_bias": True}))
    with pytest.raises(UserError, match=r"mlp_bias is True.*\. vocab_size missing"):
        read_config(path)
