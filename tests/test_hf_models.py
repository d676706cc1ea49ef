"""Models of transformers: started as it starts them, computing what it computes, trained, resumed and exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_pretraining.build import build_model
from peft_pretraining.commands.export import export
from peft_pretraining.config.flag_groups import ModelArgs, OptimizerArgs, QuantizationArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import build_on_meta, low_rank_names
from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.recorded_init import InitRecorder, UnreadableInitError
from peft_pretraining.optim.build import low_rank_converter
from tests.small_run import VOCAB, SmallRun, assert_same_run, flags_of

transformers = pytest.importorskip("transformers")

BASIC = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 16}
GEMMA = BASIC | HEADS
WINDOWS = GEMMA | {"num_hidden_layers": 2, "sliding_window": 8, "query_pre_attn_scalar": 16}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 64,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# Of each: its config, the decoder matrices of a layer, and whether its logits are the head's output and nothing else.
MODELS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "gemma": (GEMMA, 7, True),
    "gemma2": (WINDOWS, 7, False),  # caps its logits
    "gemma3_text": (WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]}, 7, True),
    "qwen2": (BASIC, 7, True),
    "qwen3": (BASIC | HEADS, 7, True),
    "mistral": (BASIC | {"sliding_window": 8}, 7, True),
    "olmo": (BASIC, 7, True),
    "gpt2": (GPT2, 4, True),
    "gpt_neox": (BASIC, 4, True),
    "falcon": (BASIC, 4, True),
    "phi": (BASIC, 6, False),  # its head has a bias
    "stablelm": (BASIC, 7, True),
    "dory": (BASIC, 8, False),  # its head has a learned scale
    "mixtral": (BASIC | {"num_local_experts": 4}, 4, True),
}


def write_config(folder: Path, model_type: str, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(MODELS[model_type][0] | {"model_type": model_type} | changes))
    return path


def built(path: Path, seed: int = 0, dtype: str = "float32", **options: bool) -> HFCausalLM:
    model = build_model(ModelArgs(str(path), use_hf_model=True, dtype=dtype, **options), seed=seed)
    assert isinstance(model, HFCausalLM)
    return model


def of_transformers(path: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(str(path))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
class TestEachModel:
    def test_starts_as_transformers_starts_it(self, name: str, tmp_path: Path) -> None:
        path = write_config(tmp_path, name)
        ours, theirs = built(path), of_transformers(path)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for (key, buffer), (other, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert key == other and buffer.dtype == expected.dtype and torch.equal(buffer, expected), key
        values = dict(ours.named_parameters())
        for key, expected in theirs.named_parameters():
            value = values[key]
            if expected.dim() == 1 or not expected.any():
                assert torch.equal(value, expected), key
                continue
            if expected.shape[0] == VOCAB:
                expected = expected[1:]  # its row of padding is zero; ours trains
            # Six standard errors of each: a factor in the depth, such as GPT-2's, is far beyond.
            assert abs(value.std() / expected.std() - 1) < 6 / value.numel() ** 0.5, key
            assert abs(value.mean()) < 6 * value.std() / value.numel() ** 0.5, key

    def test_computes_what_transformers_does(self, name: str, tmp_path: Path) -> None:
        path = write_config(tmp_path, name, initializer_range=0.1)
        ours, theirs, ids = built(path), of_transformers(path), tokens()
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        theirs.load_state_dict(ours.state_dict())
        expected = theirs(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False)
        torch.testing.assert_close(ours(ids).logits, expected.logits, rtol=1e-5, atol=1e-5)
        loss = ours(ids, ids).loss_sum
        assert loss is not None and loss.dtype == torch.float32
        torch.testing.assert_close(loss / (ids.numel() - len(ids)), expected.loss, rtol=1e-5, atol=0)
        loss.backward()
        (expected.loss * (ids.numel() - len(ids))).backward()
        grads = {key: parameter.grad for key, parameter in ours.named_parameters()}
        for key, parameter in theirs.named_parameters():
            torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-3, atol=1e-3, msg=key)

    def test_its_matrices_and_head_are_known(self, name: str, tmp_path: Path) -> None:
        model = build_on_meta(write_config(tmp_path, name), use_hf_model=True)
        _, matrices, plain = MODELS[name]
        assert isinstance(model, HFCausalLM) and all(parameter.is_meta for parameter in model.parameters())
        assert len(low_rank_names(model)) == matrices * len(model.decoder_layers)
        assert model._plain_head == plain

    def test_trains(self, name: str, tmp_path: Path) -> None:
        small = SmallRun(tmp_path)
        flags = flags_of("q_galore_adamw8bit_per_layer") | {"num_training_steps": 8, "save_every": 8}
        small.config = write_config(tmp_path, name)
        if name in ("gemma2", "gemma3_text"):  # with a norm after each block, too, they start slowly
            small.config, flags["lr"] = write_config(tmp_path, name, initializer_range=0.1), 3e-2
        result = small.run("run", use_hf_model=True, total_batch_size=4, **flags)
        assert result.losses[-1] < result.losses[0] - 0.05 and result.eval_loss < result.losses[0] - 0.05
        before, after = result.weights(0), result.weights(8)
        assert before.keys() == after.keys()
        assert not [key for key, value in after.items() if torch.equal(value, before[key])]
        quantized = [key for key in result.checkpoint().model_tensors if key.endswith("_qdata")]
        assert quantized


@pytest.mark.parametrize(
    ("name", "changes", "kept"),
    [
        ("llama4_text", HEADS | {"num_local_experts": 4}, ["feed_forward.router"]),
        ("phimoe", {"num_local_experts": 4}, ["mlp.router"]),
        ("mamba", {"state_size": 8}, ["mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]),
    ],
)
def test_what_is_more_than_a_linear_layer_is_not_converted(
    name: str, changes: dict[str, Any], kept: list[str], tmp_path: Path
) -> None:
    """Routers that give more than scores, and a weight that the model multiplies with by itself."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BASIC | {"model_type": name} | changes))
    model = built(path)
    convert = low_rank_converter(OptimizerArgs("q_galore_adamw8bit"), QuantizationArgs(weight_quant=True))
    names = [each for each, module in model.named_modules() if isinstance(module, nn.Linear)]
    for each in names:
        convert(model, each)
    left = [each for each in names if isinstance(model.get_submodule(each), nn.Linear)]
    assert [each.partition(".0.")[2] for each in left] == [*kept, ""]  # the last is the head
    loss = model(tokens(), tokens()).loss_sum
    assert loss is not None
    loss.backward()


def test_gemmas_norms_start_at_zero(tmp_path: Path) -> None:
    """They multiply with 1 + w."""
    norms = [p for name, p in built(write_config(tmp_path, "gemma")).named_parameters() if "norm" in name]
    assert len(norms) == 3 and not any(norm.any() for norm in norms)


def test_values_depend_on_seed_and_name_and_not_on_the_global_generator(tmp_path: Path) -> None:
    path = write_config(tmp_path, "gpt2", n_layer=2)
    before = torch.get_rng_state()
    one, half = built(path, seed=3).state_dict(), built(path, seed=3, dtype="bfloat16").state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    again, other = built(path, seed=3).state_dict(), built(path, seed=4).state_dict()
    for name, value in one.items():
        assert torch.equal(value, again[name]) and torch.equal(value.bfloat16(), half[name]), name
        assert torch.equal(value, other[name]) == (value.unique().numel() == 1), name
    layers = [one[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 1)]
    assert not torch.equal(*layers)


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    path, grads = write_config(tmp_path, "gemma2"), []
    for again in (False, True):
        model = built(path, activation_checkpointing=again)
        loss = model(tokens(), tokens()).loss_sum
        assert loss is not None
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("gemma3_text", "q_galore_adamw8bit_per_layer"), ("gpt2", "galore_adamw8bit"), ("phi", "adamw")],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(name: str, optimizer: str, tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    small.config = write_config(tmp_path, name)
    flags = flags_of(optimizer) | {"use_hf_model": True, "num_training_steps": 5}
    whole = small.run("whole", **flags)
    small.stop("parts", at=2, **flags)
    assert_same_run(small.run("parts", **flags, continue_from="auto"), whole)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["gemma", "gpt_neox"])
def test_an_export_computes_what_was_trained(name: str, bits: int, tmp_path: Path) -> None:
    small = SmallRun(tmp_path)
    small.config = write_config(tmp_path, name)
    flags = flags_of("q_galore_adamw8bit") | {"weight_bits": bits, "use_hf_model": True, "num_training_steps": 2}
    result = small.run("run", **flags)
    export(result.save_dir, tmp_path / "exported", "float32")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    evaluated = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert evaluated["model_type"] == name and loaded.dtype == torch.float32
    expected = built(small.config)
    expected.load_state_dict(loaded.state_dict())
    state = loaded.state_dict()
    if bits == 8:
        for key, value in result.weights().items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(loaded(tokens()).logits, expected(tokens()).logits, rtol=1e-5, atol=1e-5)


ENCODER = BASIC | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RECURRENT = BASIC | {"model_type": "recurrent_gemma", "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GPT2 | {"model_type": "gpt2", "resid_pdrop": 0.1}, r"GPT2LMHeadModel drops values.*resid_pdrop 0\.1"),
        (BASIC | {"model_type": "mistral", "attention_dropout": 0.2}, r"attention_dropout 0\.2\).*: set what"),
        (ENCODER, "is_decoder is false, so each token of BertLMHeadModel would see the next ones"),
        (GEMMA | {"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is"),
        ({"model_type": "gemma3"}, r"'gemma3' is more than a language model; .* model_type 'gemma3_text'"),
        ({"model_type": "t5"}, "is_encoder_decoder is true; --use_hf_model trains decoders"),
        (RECURRENT, "computes what model.layers.0.temporal_block.rg_lru.recurrent_param starts with"),
    ],
)
def test_what_cannot_be_trained_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as caught:
        build_on_meta(path, use_hf_model=True)
    assert str(path) in str(caught.value)


def test_a_decoder_of_berts_form_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ENCODER | {"is_decoder": True}))
    model, ids = built(path), tokens()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCAB
    logits, others = model.eval()(ids).logits, model(changed).logits
    assert not any(module.training for module in model._network[0].modules())
    assert logits is not None and others is not None
    torch.testing.assert_close(logits[:, :-1], others[:, :-1])


def test_sequences_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    model = built(write_config(tmp_path, "gpt2"))
    assert model(tokens(1, 64)).logits is not None
    with pytest.raises(UserError, match=r"--max_length is 65, but .*config\.json has max_position_embeddings 64"):
        model(tokens(1, 65))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rank": 65}, "--rank is 65, but transformer.h.0.attn.c_attn of {} is 192 x 64: give at most 64."),
        ({"mlp_rank": 65}, "--mlp_rank is 65, but transformer.h.0.mlp.c_fc of {} is 256 x 64: give at most 64."),
        ({"max_length": 65}, "--max_length is 65, but --model_config {} has max_position_embeddings 64"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: dict[str, object], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SmallRun(tmp_path)
    small.config = write_config(tmp_path, "gpt2")
    assert small.main("run", use_hf_model=True, **flags_of("q_galore_adamw8bit") | flags) == 2
    printed = capsys.readouterr().err
    assert says.format(small.config) in printed and "Traceback" not in printed


class Odd(nn.Module):
    """Initialises itself in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.part = nn.Parameter(torch.empty(4, 3))
        self.chain = nn.Parameter(torch.empty(5))
        self.log = nn.Parameter(torch.empty(3))
        self.from_another = nn.Parameter(torch.empty(3))
        with torch.no_grad():
            nn.init.constant_(self.part, 5.0)
            self.part[1:3, 1] = 7.0
            nn.init.normal_(self.chain)  # as the layer; then as the model
            nn.init.uniform_(self.chain, 1.0, 2.0)
            self.chain.mul_(10.0).add_(1.0)
            self.log.copy_(torch.log(torch.arange(1, 4, device=self.log.device)))
            self.from_another.copy_(2 * self.kept)


def test_unusual_initial_values_are_drawn_as_they_are_written() -> None:
    recorder = InitRecorder()
    with recorder:
        odd = Odd()
    assert all(parameter.is_meta for parameter in odd.parameters())
    assert not nn.Linear(2, 2).weight.is_meta  # outside of it nothing changes
    drawn = {}
    for name in ("kept", "part", "chain", "log"):
        drawn[name] = recorder.initial_value(getattr(odd, name)).draw(torch.Generator().manual_seed(0))
    assert torch.equal(drawn["kept"], torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.full((4, 3), 5.0)
    expected[1:3, 1] = 7.0
    assert torch.equal(drawn["part"], expected)
    assert torch.equal(recorder.initial_value(odd.part, whole=True).draw(torch.Generator()), torch.full((4, 3), 5.0))
    uniform = torch.empty(5).uniform_(1.0, 2.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn["chain"], uniform.mul_(10.0).add_(1.0))  # nothing is drawn for what is written over
    assert torch.equal(drawn["log"], torch.log(torch.arange(1, 4)))
    with pytest.raises(UnreadableInitError):
        recorder.initial_value(odd.from_another)
