"""--init_from: a run begins with the weights of a model in Hugging Face's format, or of another run."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_pretraining.build import build_training
from peft_pretraining.checkpoint import weight_source
from peft_pretraining.checkpoint.initial_weights import load_initial_weights, put_weights
from peft_pretraining.checkpoint.store import save_checkpoint
from peft_pretraining.checkpoint.tensor_file import HashingFile, stored_tensors, write_tensors
from peft_pretraining.checkpoint.weight_source import open_source
from peft_pretraining.config.parse import parse_args
from peft_pretraining.errors import UserError
from peft_pretraining.models import hub_files
from peft_pretraining.models.build import network_on_meta
from peft_pretraining.models.config import read_config_json
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.registry import read_config
from peft_pretraining.models.source_tokenizer import tokenizer_of_source
from peft_pretraining.runtime.world import World
from qgalore.layer.linear import LowRankLinear
from qgalore.layer.quantization import quantize
from qgalore.layer.stored_weight import store_float_, store_quantized_
from tests.data.hub_server import DatasetHub, HubRepository, point_at
from tests.small_run import CONFIG, SmallRun, assert_same_run, flags_of, write_text

transformers = pytest.importorskip("transformers")

HERE = World(0, 1, torch.device("cpu"))
Q_GALORE = flags_of("q_galore_adamw8bit_per_layer")


def theirs(**changes: object) -> Any:
    """A model of transformers with other weights than zeros and ones everywhere."""
    config = {**CONFIG, "initializer_range": 0.1, "num_key_value_heads": 1} | changes
    model_type = config.pop("model_type")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    return SmallRun(tmp_path)


def argv(small: SmallRun, source: Path | str, **flags: object) -> list[str]:
    return small.argv("run", {"model_config": None, "init_from": source} | flags)


def loaded(small: SmallRun, source: Path | str, **flags: object) -> CausalLM:
    """The model of a run that begins with the weights of `source`."""
    args = parse_args(argv(small, source, **flags))
    model, _ = build_training(args, torch.device("cpu"))
    load_initial_weights(args.model, model, HERE)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload, no-any-return]


def distance(model: CausalLM, other: Any) -> float:
    """The largest difference of two models' logits."""
    with torch.no_grad():
        logits = model(tokens()).logits
        assert logits is not None
        return float((logits - other(input_ids=tokens()).logits).abs().max())


# ---- what is computed


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_computes_what_transformers_does(small: SmallRun, model_type: str, tied: bool) -> None:
    model = theirs(model_type=model_type, tie_word_embeddings=tied, num_hidden_layers=2)
    model.save_pretrained(small.folder / "source")
    assert distance(loaded(small, small.folder / "source"), model) < 2e-5
    assert distance(loaded(small, small.folder / "source", use_hf_model=True), model) < 2e-5


def test_the_first_evaluation_is_that_of_transformers(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    model = theirs()
    model.save_pretrained(small.folder / "source")
    ids = torch.frombuffer(bytearray((small.data / "validation.uint16").read_bytes()), dtype=torch.uint16).long()
    rows = ids[: 13 * 32].view(-1, 32)  # the fewest with 400 targets
    with torch.no_grad():
        expected = float(model(input_ids=rows, labels=rows).loss)
    flags: dict[str, object] = {"model_config": None, "init_from": small.folder / "source", "num_training_steps": 1}

    def first(name: str, **more: object) -> float:
        line = small.run(name, **flags | more).lines[0]
        assert line["update_step"] == 0 and line["eval/tokens"] == rows.shape[0] * 31
        return float(line["eval/loss"])

    assert first("float") == pytest.approx(expected, rel=1e-6)
    said = capsys.readouterr().err
    assert f"weights of {small.folder / 'source'}\n" in said and "update 0: perplexity" in said
    int8 = first("int8", **Q_GALORE)
    assert int8 == pytest.approx(expected, rel=2e-3) and int8 != pytest.approx(expected, rel=1e-6)
    assert first("hf", use_hf_model=True) == pytest.approx(expected, rel=1e-6)


def test_quantized_weights_are_the_nearest_codes_of_the_source(small: SmallRun) -> None:
    model = theirs()
    model.save_pretrained(small.folder / "source")
    for bits in (8, 4):
        layers = dict(loaded(small, small.folder / "source", weight_bits=bits, **Q_GALORE).named_modules())
        for name, linear in model.named_modules():
            layer = layers.get(name)
            if not isinstance(layer, LowRankLinear):
                continue
            expected = LowRankLinear(linear.weight, None, layer.format)
            assert torch.equal(layer.weight, expected.weight) and layer.quantized_weight is not None
            assert torch.equal(layer.weight_scale, expected.weight_scale)  # type: ignore[arg-type]


def test_a_conv1d_is_turned(small: SmallRun) -> None:
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True}
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = theirs(model_type="gpt2", **shape, **off)
    model.save_pretrained(small.folder / "source")
    assert distance(loaded(small, small.folder / "source", use_hf_model=True), model) < 2e-5
    assert distance(loaded(small, small.folder / "source", use_hf_model=True, **Q_GALORE), model) < 0.3


def test_tensors_that_transformers_renames_are_refused(small: SmallRun) -> None:
    theirs(model_type="mixtral", num_local_experts=2).save_pretrained(small.folder / "source")
    with pytest.raises(
        UserError, match=r"gate_up_proj is missing there.*transformers renames or joins tensors of this"
    ):
        loaded(small, small.folder / "source", use_hf_model=True)


# ---- forms of a source


def test_shards_pickles_and_base_models(small: SmallRun) -> None:
    model, folder = theirs(num_hidden_layers=2), small.folder / "shards"
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / "model.safetensors.index.json").is_file()
    assert distance(loaded(small, folder), model) < 2e-5
    pickles = small.folder / "pickles"
    pickles.mkdir()
    model.config.save_pretrained(pickles)
    torch.save(model.state_dict(), pickles / "pytorch_model.bin")
    assert distance(loaded(small, pickles), model) < 2e-5
    torch.save(model.state_dict(), pickles / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert distance(loaded(small, pickles), model) < 2e-5
    tied = theirs(tie_word_embeddings=True)
    tied.model.save_pretrained(small.folder / "base")  # names without "model.", and no head
    assert "layers.0.mlp.up_proj.weight" in stored_tensors(small.folder / "base" / "model.safetensors")
    assert distance(loaded(small, small.folder / "base"), tied) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_float_types(small: SmallRun, dtype: torch.dtype) -> None:
    theirs().to(dtype).save_pretrained(small.folder / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(small.folder / "source", dtype=torch.float32)
    assert distance(loaded(small, small.folder / "source"), model) < 2e-5
    for simulation in (False, True):
        layer = up_proj(loaded(small, small.folder / "source", **Q_GALORE | {"simulation": simulation or None}))
        expected = LowRankLinear(model.model.layers[0].mlp.up_proj.weight, None, layer.format)
        assert torch.equal(layer.weight, expected.weight) and layer.format.simulate == simulation
    in_bfloat16 = loaded(small, small.folder / "source", dtype="bfloat16")
    assert in_bfloat16.get_parameter("lm_head.weight").dtype == torch.bfloat16


def up_proj(model: CausalLM) -> LowRankLinear:
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, LowRankLinear)
    return layer


def test_old_buffers_are_ignored_and_a_tied_source_can_be_untied(small: SmallRun) -> None:
    model, folder = theirs(tie_word_embeddings=True), small.folder / "source"
    model.save_pretrained(folder)
    tensors = {name: each.read() for name, each in stored_tensors(folder / "model.safetensors").items()}
    write(folder / "model.safetensors", tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    untied = small.folder / "untied.json"
    untied.write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}))
    ours = loaded(small, folder, model_config=untied)
    assert distance(ours, model) < 2e-5
    assert ours.get_parameter("lm_head.weight") is not ours.get_parameter("model.embed_tokens.weight")


def test_two_tensors_for_a_tied_weight(small: SmallRun) -> None:
    model, folder = theirs(), small.folder / "source"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight and lm_head\.weight differ there.*tie_word_emb"):
        loaded(small, folder)
    tensors = {name: each.read() for name, each in stored_tensors(folder / "model.safetensors").items()}
    write(folder / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    ours = loaded(small, folder)
    assert torch.equal(ours.get_parameter("lm_head.weight"), tensors["model.embed_tokens.weight"])


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("wb") as file:
        write_tensors(HashingFile(file), tensors)


def test_from_the_hub_at_one_commit(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs(num_hidden_layers=2)
    model.save_pretrained(small.folder / "single")
    model.save_pretrained(small.folder / "shards", max_shard_size="100KB")
    (small.folder / "empty").mkdir()
    (small.folder / "empty" / "config.json").write_text(json.dumps(CONFIG))
    models = {f"them/{name}": HubRepository(small.folder / name) for name in ("single", "shards", "empty")}
    hub = DatasetHub(models)
    point_at(hub, small.folder / "cache", monkeypatch)
    try:
        for name in ("them/single", "them/shards"):
            assert distance(loaded(small, name), model) < 2e-5
        with pytest.raises(UserError, match=r"--init_from them/empty: on the hub it has no model\.safetensors"):
            loaded(small, "them/empty")
        with pytest.raises(UserError, match="--init_from them/nobody: there is no such file or folder, and the hub"):
            loaded(small, "them/nobody")
    finally:
        hub.close()
    commit = models["them/single"].refs()["main"][0]
    assert open_source("them/single").words == f"them/single at commit {commit}"
    monkeypatch.setattr(hub_files, "_found", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("them/single", "them/shards"):
        assert distance(loaded(small, name), model) < 2e-5, "what is in the cache needs no hub"


# ---- from a run


def test_codes_of_a_run_go_in_unchanged(small: SmallRun) -> None:
    first = small.run("first", num_training_steps=3, save_every=2, **Q_GALORE)
    before = first.checkpoint().model_tensors
    for source in (first.save_dir, first.checkpoints[-1]):
        after = loaded(small, source, **Q_GALORE).state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    older = loaded(small, first.checkpoints[1], **Q_GALORE).state_dict()
    assert not torch.equal(older["lm_head.weight"], before["lm_head.weight"])
    # In another format their values are rounded again, and a float run has them as they are.
    floats = loaded(small, first.save_dir)
    for name, value in first.weights().items():
        assert torch.equal(floats.get_parameter(name), value), name
    layer = up_proj(loaded(small, first.save_dir, weight_bits=4, **Q_GALORE))
    expected = LowRankLinear(first.weights()["model.layers.0.mlp.up_proj.weight"], None, layer.format)
    assert torch.equal(layer.weight, expected.weight)
    by_rows = Q_GALORE | {"int8_products": True, "weight_group_size": None}
    whole_rows = small.run("rows", num_training_steps=1, **by_rows)
    after = loaded(small, whole_rows.save_dir, **by_rows).state_dict()
    assert all(torch.equal(after[name], value) for name, value in whole_rows.checkpoint().model_tensors.items())


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_in_padded_rows(small: SmallRun, bits: int) -> None:
    """101 columns are padded in memory and not in a checkpoint; at 4 bits the last byte of a row holds one code."""
    small.config.write_text(json.dumps(CONFIG | {"intermediate_size": 101}))
    flags = Q_GALORE | {"weight_bits": bits}
    model, _ = build_training(parse_args(small.argv("run", flags)), torch.device("cpu"))
    state = parse_args(small.argv("run", flags)).to_dict()
    before = {name: value for name, value in model.state_dict().items() if not name.endswith("_format")}  # as of old
    save_checkpoint(
        small.folder / "old", 1, before, {}, state | {"model_config_contents": read_config_json(small.config)}
    )
    after = loaded(small, small.folder / "old", **flags).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_floats_beside_codes_serve_another_format(small: SmallRun) -> None:
    from qgalore import WeightFormat, convert_linears

    model = theirs()
    convert_linears(model, ["model.layers.0.mlp.up_proj"], WeightFormat(8, 48))
    model.save_pretrained(small.folder / "source")
    stored = stored_tensors(small.folder / "source" / "model.safetensors")
    codes, floats = (stored[f"model.layers.0.mlp.up_proj.weight{part}"].read() for part in ("_qdata", ""))
    assert torch.equal(
        loaded(small, small.folder / "source", **Q_GALORE).state_dict()["model.layers.0.mlp.up_proj.weight_qdata"],
        codes,
    )
    assert torch.equal(loaded(small, small.folder / "source").state_dict()["model.layers.0.mlp.up_proj.weight"], floats)


def test_a_run_goes_on_without_its_source(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    """And equals one that was not stopped; where there is no checkpoint, it begins with the source."""
    source = small.folder / "source"
    theirs().save_pretrained(source)
    flags: dict[str, object] = {"model_config": None, "init_from": source, "num_training_steps": 4, "save_every": 2}
    whole = small.run("whole", continue_from="auto", **flags, **Q_GALORE)
    assert whole.lines[0]["update_step"] == 0
    stopped = small.stop("run", at=2, continue_from="auto", **flags, **Q_GALORE)
    assert stopped.checkpoint().state["initial_weights"] == str(source)
    source.rename(small.folder / "gone")
    capsys.readouterr()
    assert_same_run(small.run("run", continue_from="auto", **flags, **Q_GALORE), whole)
    assert f"the run began with the weights of {source}" in capsys.readouterr().err
    assert small.main("new", continue_from="auto", **flags, **Q_GALORE) == 2
    assert f"--init_from {source}: no such folder" in capsys.readouterr().err


def test_a_run_that_began_with_random_weights_keeps_its_own(
    small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    small.run("run", num_training_steps=1)
    theirs(num_key_value_heads=2).save_pretrained(small.folder / "source")
    flags: dict[str, object] = {"continue_from": "auto", "init_from": small.folder / "source"}
    again = small.run("run", num_training_steps=2, **flags)
    assert "source is not read: the run goes on, and began with random weights" in capsys.readouterr().err
    assert again.checkpoint().state["initial_weights"] == "" and "eval/loss" not in again.lines[0]


@pytest.mark.slow
def test_two_ranks_begin_with_the_same_weights(small: SmallRun) -> None:
    theirs().save_pretrained(small.folder / "source")
    flags: dict[str, object] = {"model_config": None, "init_from": small.folder / "source", "num_training_steps": 2}
    flags |= {"check_replicas": 1, "dtype": "float32"}
    one, two = small.run("one", **flags), small.run_on(2, "two", **flags)
    assert two.losses == pytest.approx(one.losses, rel=1e-5) and two.lines[0]["update_step"] == 0


# ---- the tokenizer


def test_the_tokenizer_of_the_source_is_the_default(small: SmallRun, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(small.folder / "text")
    source = small.folder / "source"
    theirs(vocab_size=400).save_pretrained(source)
    assert tokenizer_of_source(str(source)) == ""
    (source / "tokenizer.json").write_bytes((small.folder / "text" / "tokenizer.json").read_bytes())
    assert tokenizer_of_source(str(source)) == str(source)
    flags: dict[str, object] = {"model_config": None, "init_from": source, "num_training_steps": 1}
    first = small.run("first", **flags | text | {"tokenizer": None})
    assert f"{source}" in capsys.readouterr().err
    # A run has that of its own source, or that of its flag, or the one that was trained for it.
    assert tokenizer_of_source(str(first.save_dir)) == tokenizer_of_source(str(first.checkpoints[0])) == str(source)
    second = small.run("second", **flags | text | {"tokenizer": "train:400"})
    trained = second.save_dir / "tokenizer" / "tokenizer.json"
    assert tokenizer_of_source(str(second.save_dir)) == tokenizer_of_source(str(second.checkpoints[0])) == str(trained)
    third = small.run("third", **flags | text | {"init_from": second.save_dir, "tokenizer": None})
    assert third.losses != first.losses
    (source / "tokenizer.json").unlink()
    source.rename(small.folder / "gone")
    assert (
        small.main("first", continue_from="auto", **flags | text | {"tokenizer": None, "model_config": small.config})
        == 2
    )
    assert "its tokenizer is the default of --tokenizer: give --tokenizer" in capsys.readouterr().err
    with pytest.raises(UserError, match="give --tokenizer"):
        tokenizer_of_source(str(source))


def test_another_tokenizer_than_that_of_the_source_is_warned_of(small: SmallRun) -> None:
    text = write_text(small.folder / "text")
    source, file = small.folder / "source", small.folder / "text" / "tokenizer.json"
    theirs(num_key_value_heads=2).save_pretrained(source)
    assert parse_args(argv(small, source, **text)).warnings == (), "it has none"
    (source / "tokenizer.json").write_bytes(file.read_bytes())
    assert parse_args(argv(small, source, **text)).warnings == (), "a copy"
    assert parse_args(argv(small, source, **text | {"tokenizer": None})).warnings == ()
    assert parse_args(argv(small, source, tokenizer="train:400")).warnings == (), "of token ids"
    for name in ("train:400", "t5-base"):
        (warning,) = parse_args(argv(small, source, **text | {"tokenizer": name})).warnings
        assert warning.startswith(f"--tokenizer {name} is not {source}, the tokenizer of --init_from {source}: ")
    (source / "tokenizer.json").write_text("{}")
    (warning,) = parse_args(argv(small, source, **text)).warnings
    assert "leave --tokenizer out" in warning


# ---- memory


def test_one_tensor_of_the_source_is_held_at_a_time(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs(num_hidden_layers=2).save_pretrained(small.folder / "source")
    alive: list[weakref.ref[Any]] = []
    most = [0]

    def watched(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            value = read()
            alive.append(weakref.ref(value.untyped_storage()))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            return value

        return call

    def opened(name: str, *rest: Any, **options: Any) -> weight_source.WeightSource:
        source = open_source(name, *rest, **options)
        stored = {key: each._replace(read=watched(each.read)) for key, each in source.stored.items()}
        return weight_source._with_parts(source, stored)

    monkeypatch.setattr("peft_pretraining.checkpoint.initial_weights.open_source", opened)
    loaded(small, small.folder / "source", **Q_GALORE)
    assert len(alive) == 2 * 9 + 3 and most[0] == 1


def test_the_host_holds_the_model_and_one_tensor(small: SmallRun) -> None:
    """The peak of this process, as the kernel counts it; 160 MB of weights in bfloat16 are read into INT8.

    The kernel also counts pages of the file that it keeps mapped, more on a busy machine: 9 to 39 MB of 80 were seen.
    """
    source = small.folder / "source"
    source.mkdir()
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8}
    (source / "config.json").write_text(json.dumps(CONFIG | shape))
    shapes = {name: value.shape for name, value in network_on_meta(read_config(source)).state_dict().items()}
    write(source / "model.safetensors", {name: torch.ones(size, dtype=torch.bfloat16) for name, size in shapes.items()})
    args = parse_args(argv(small, source, **Q_GALORE | {"dtype": "bfloat16"}))
    model, _ = build_training(args, torch.device("cpu"))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    put_weights(open_source(str(source)), model, str(source))
    assert memory("VmHWM") - before < (source / "model.safetensors").stat().st_size / 2


def memory(kind: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) * 1024


# ---- what is refused


def test_what_does_not_fit_is_refused_by_the_name_of_the_tensor(small: SmallRun) -> None:
    folder = small.folder / "source"
    theirs(num_hidden_layers=2).save_pretrained(folder)
    path = folder / "model.safetensors"
    good = {name: each.read() for name, each in stored_tensors(path).items()}
    norm = "model.norm.weight"
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({norm: None}, r"model\.norm\.weight is missing there"),
        ({"lm_head.weight": None}, r"lm_head\.weight is missing there"),
        ({"model.extra.weight": torch.ones(3)}, r"model\.extra\.weight is not in this model"),
        ({norm: torch.ones(65)}, r"model\.norm\.weight is 65 there and 64 here"),
        ({norm: torch.ones(64, dtype=torch.int8)}, r"model\.norm\.weight is int8 there, and no float"),
    ]
    for changes, message in cases:
        write(path, {name: value for name, value in (good | changes).items() if value is not None})
        with pytest.raises(UserError, match=f"--init_from .*source does not hold the model of its own conf.*{message}"):
            loaded(small, folder)
    write(path, {name: value for name, value in good.items() if ".layers.1." not in name})
    with pytest.raises(
        UserError, match=r"layers\.1\..* is missing there; .*and 6 more\. Its files are not of one model"
    ):
        loaded(small, folder)


def test_a_layer_takes_weights_of_its_own_shape_alone(small: SmallRun) -> None:
    layer = up_proj(build_training(parse_args(small.argv("run", Q_GALORE)), torch.device("cpu"))[0])
    for weight in (torch.zeros(64, 128), torch.zeros(128, 65)):
        with pytest.raises(ValueError, match="does not fit a layer of 128 x 64"):
            store_float_(layer, weight)
        with pytest.raises(ValueError, match="does not fit a layer of 128 x 64"):
            store_quantized_(layer, quantize(weight))


def test_nothing_is_changed_by_weights_that_do_not_fit(small: SmallRun) -> None:
    theirs(num_hidden_layers=2).save_pretrained(small.folder / "source")
    args = parse_args(small.argv("run", {}))
    model, _ = build_training(args, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"does not fit --model_config a config: .*layers\.1\..* is not in this model"):
        put_weights(open_source(str(small.folder / "source")), model, "a config")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_shape_than_that_of_the_model_config_is_a_sentence(small: SmallRun) -> None:
    theirs(num_key_value_heads=2, vocab_size=300).save_pretrained(small.folder / "source")
    for name in (small.folder / "source", str(small.folder / "source")):
        with pytest.raises(
            UserError, match=r"not of the shape of --model_config .*: vocab_size is 300 there and 256 here"
        ):
            parse_args(argv(small, name, model_config=small.config))
    theirs(num_key_value_heads=2, rms_norm_eps=1e-5).save_pretrained(small.folder / "source")
    (warning,) = parse_args(argv(small, small.folder / "source", model_config=small.config)).warnings
    assert warning.startswith("rms_norm_eps is 1e-05 in --init_from")
    assert parse_args(argv(small, small.folder / "source")).warnings == ()


def test_sources_that_are_none(small: SmallRun) -> None:
    folder = small.folder / "source"
    with pytest.raises(UserError, match=r"--init_from .*source: no such folder; give the folder of a model"):
        parse_args(argv(small, folder))
    with pytest.raises(UserError) as error:
        parse_args(argv(small, folder))
    assert str(error.value).count("no such folder") == 1, "one problem is said once"
    (small.folder / "file.json").write_text("[]")
    with pytest.raises(UserError, match=r"--init_from .*file\.json is a file: give the folder that it is in"):
        parse_args(argv(small, small.folder / "file.json"))
    folder.mkdir()
    with pytest.raises(UserError, match=r"a folder without config\.json.*--model_config is taken from there"):
        parse_args(argv(small, folder))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds adapter_model\.safetensors, an adapter, and not a whole model"):
        loaded(small, folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds config\.json: there is no model\.safetensors or pytorch_model\.bin"):
        loaded(small, folder)
    for content in (b"hi\n", b"no pickle at all"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"pytorch_model\.bin is not read: it is cut off, or"):
            loaded(small, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read: .* could run code; save .* as safetensors"):
        loaded(small, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"index\.json names model-1\.safetensors, which is missing: fetch it"):
        loaded(small, folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model-1.safetensors"}}')
    with pytest.raises(UserError, match=r"'\.\./model-1\.safetensors', which is not in its folder"):
        loaded(small, folder)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"model\.safetensors is a pointer of Git LFS"):
        loaded(small, folder)
    theirs(num_key_value_heads=2).save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off: .* fetch it again"):
        loaded(small, folder)


def test_a_damaged_checkpoint_is_refused(small: SmallRun) -> None:
    first = small.run("first", num_training_steps=1)
    path = first.checkpoints[-1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--init_from .*first: model\.safetensors is damaged, its SHA-256 differs"):
        loaded(small, first.save_dir)


def test_a_command_line_names_a_config_or_a_source() -> None:
    with pytest.raises(UserError, match=r"--model_config is missing"):
        parse_args(["--batch_size", "2", "--dataset", "pydocs"])
