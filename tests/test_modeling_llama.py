"""Our LLaMA: it agrees with transformers', trains under checkpointing and compilation, and starts alike everywhere."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_cache, run_and_get_code

from peft_pretraining.build import build_model
from peft_pretraining.config.flag_groups import ModelArgs
from peft_pretraining.errors import UserError
from peft_pretraining.models.build import build_on_meta, low_rank_names, parameter_count
from peft_pretraining.models.compile import GivesUpGradients
from peft_pretraining.models.hf import HFCausalLM
from peft_pretraining.models.init import materialize
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.llama.modeling import LlamaAttention, LlamaForCausalLM, LlamaRMSNorm, cudnn_length
from peft_pretraining.models.network import CausalLM
from peft_pretraining.models.ops.rotary import rotary_tables
from peft_pretraining.models.rope import RopeScaling
from qgalore import QGaLoreAdamW8bit, WeightFormat, convert_linears, low_rank_param_groups

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large, so that every part of the model shows in the logits
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}
LLAMA_3_1 = {  # its context of training cut down, so that a head has kept, mixed and slowed pairs
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    "old theta": {"rope_theta": 250.0},
    "wide heads": {"head_dim": 12},
    "LLaMA 3.1": {"rope_parameters": LLAMA_3_1 | {"rope_theta": 5e5}},
    "LLaMA 3.1, older spelling": {"rope_scaling": LLAMA_3_1, "rope_theta": 5e5},
    "biases": {"attention_bias": True},
    "Qwen2": QWEN2,
    "Qwen2, tied": QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1e6, "sliding_window": 4},
}


def write_config(folder: Path, **changes: object) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return path


def built(
    path: Path, use_hf_model: bool = False, dtype: str = "bfloat16", seed: int = 0, **options: bool | int
) -> CausalLM:
    """The model of a configuration on the CPU; options: further fields of `ModelArgs`."""
    args = ModelArgs(str(path), use_hf_model=use_hf_model, dtype=dtype, **options)  # type: ignore[arg-type]
    return build_model(args, seed=seed)


def tokens(batch: int = 3, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_config(tmp_path, **VARIANTS[variant])
    ours = built(path, dtype="float32", seed=3)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(str(path)))
    assert {type(theirs).__name__} == set(json.loads(path.read_text())["architectures"])
    assert set(ours.state_dict()) == set(theirs.state_dict())
    biases = [parameter for name, parameter in ours.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 3 * {"biases": 4, "Qwen2": 3, "Qwen2, tied": 3}.get(variant, 0)
    with torch.no_grad():
        for bias in biases:  # zero so far
            bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    logits = ours(tokens()).logits
    expected = theirs(tokens()).logits
    assert logits is not None and expected.std() > 0.3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_each_part_of_llama_3_1s_scaling_shows() -> None:
    """Pairs that come around in the old context often, sometimes and hardly ever: kept, mixed, slowed by the factor."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 40)
    plain, scaled = (rotary_tables(2, 8, 100.0, torch.device("cpu"), x)[1][1].asin() for x in (None, scaling))
    frequencies = 100.0 ** -(torch.arange(4) / 4)  # which come around 6.4, 2.0, 0.64 and 0.20 times in 40 tokens
    torch.testing.assert_close(plain[1:], frequencies[1:])
    turns = 40 * frequencies[1] / (2 * torch.pi)
    mixed = (turns - 1) / 3 + (4 - turns) / 3 / 8
    torch.testing.assert_close(scaled / plain, torch.stack([torch.tensor(1.0), mixed, *torch.tensor([1 / 8, 1 / 8])]))


def test_bfloat16_logits_are_near_float32(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    exact = built(path, dtype="float32", seed=3)
    rounded = built(path, dtype="bfloat16", seed=3)
    exact.load_state_dict({key: value.float() for key, value in rounded.state_dict().items()})
    difference = (rounded(tokens()).logits.float() - exact(tokens()).logits).abs().max()
    # A dozen roundings to 8 bits on values of size 3 at most.
    assert 0 < difference < 0.15


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}])
def test_hf_adapter_is_the_same_model(tmp_path: Path, changes: dict[str, object]) -> None:
    pytest.importorskip("transformers")
    path = write_config(tmp_path, **changes)
    labels = tokens()
    labels[1, 9:] = -100
    results = []
    for use_hf in (False, True):
        model = built(path, use_hf, "float32", seed=5, activation_checkpointing=use_hf)
        loss = model(tokens(), labels).loss_sum
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss, grads, model.state_dict(), low_rank_names(model), parameter_count(model)))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert list(ours[2]) == list(theirs[2]) and ours[3:] == theirs[3:]
    for name, value in ours[2].items():
        assert torch.equal(value, theirs[2][name]), name
    for name, grad in ours[1].items():
        torch.testing.assert_close(grad, theirs[1][name], rtol=1e-3, atol=1e-3, msg=name)


def test_loss_is_the_sum_over_shifted_targets(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="float32", seed=1)
    ids, labels = tokens(2, 6), tokens(2, 6)
    labels[0, 3:] = -100
    labels[:, 0] = 5  # the first label is nobody's target
    output = model(ids, labels)
    log_p = model(ids).logits.log_softmax(-1)
    expected = -sum(log_p[b, i, labels[b, i + 1]] for b, last in ((0, 2), (1, 5)) for i in range(last))
    assert output.loss_sum.dtype == torch.float32 and output.logits is None
    torch.testing.assert_close(output.loss_sum, expected)


def test_loss_without_any_target_is_zero(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="float32")
    loss = model(tokens(), torch.full((3, 17), -100)).loss_sum
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_right_padding_changes_nothing_before_it(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="float32")
    ids = tokens(2, 16)
    padded = ids.clone()
    padded[:, 10:] = 0
    torch.testing.assert_close(model(ids).logits[:, :10], model(padded).logits[:, :10])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_gradients(tmp_path: Path, dtype: str) -> None:
    path = write_config(tmp_path, num_key_value_heads=3)
    grads = []
    for options in ({}, {"checkpoint_every": 1}, {"checkpoint_every": 2}, {"checkpoint_layers": 1}):
        model = built(path, False, dtype, seed=2, activation_checkpointing=bool(options), **options)
        model(tokens(), tokens()).loss_sum.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, other) for a, *others in zip(*grads, strict=True) for other in others)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_single_tensors_gives_the_same_gradients(tmp_path: Path, compiled: bool) -> None:
    path = write_config(tmp_path, num_key_value_heads=3)
    grads = []
    for names in ("", "attention", "residual", "qkv", "mlp", "attention:1,qkv,mlp:1", "attention,residual,qkv,mlp"):
        model = built(path, False, "bfloat16", seed=2, recompute=names)
        assert isinstance(model, LlamaForCausalLM)
        if compiled:
            torch.compiler.reset()
            model.compile_layers(backend="aot_eager_decomp_partition")
        model(tokens(), tokens()).loss_sum.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, other) for a, *others in zip(*grads, strict=True) for other in others)


@pytest.mark.slow
def test_layers_that_recompute_single_tensors_are_found_among_what_was_compiled_before(tmp_path: Path) -> None:
    """By their policy, which is no part of the graph; with the bits of those that keep all."""
    path, grads = write_config(tmp_path), []
    with fresh_cache():
        for names in ("", "attention:1,mlp", "attention:1,mlp"):
            torch.compiler.reset()
            torch._dynamo.utils.counters.clear()
            model = built(path, False, "bfloat16", seed=2, recompute=names)
            assert isinstance(model, LlamaForCausalLM)
            model.compile_layers()
            model(tokens(), tokens()).loss_sum.backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        found = torch._dynamo.utils.counters["aot_autograd"]
    assert all(torch.equal(a, other) for a, *others in zip(*grads, strict=True) for other in others)
    assert found["autograd_cache_hit"] == 2 and not found["autograd_cache_miss"] and not found["autograd_cache_bypass"]


def test_checkpointing_keeps_fewer_tensors(tmp_path: Path) -> None:
    saved = []
    path = write_config(tmp_path, num_hidden_layers=4)
    for options in ({}, {"checkpoint_every": 1}, {"checkpoint_every": 2}, {"checkpoint_layers": 3}):
        model = built(path, dtype="float32", activation_checkpointing=bool(options), **options)
        sizes: list[int] = []
        pack = lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(tokens(), tokens())
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 2
    assert abs(saved[2] - (saved[0] + saved[1]) / 2) < 0.02 * saved[0]
    assert abs(saved[3] - (saved[0] + 3 * saved[1]) / 4) < 0.02 * saved[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_without_a_graph_break(tmp_path: Path, checkpointing: bool) -> None:
    model = built(write_config(tmp_path), dtype="float32", activation_checkpointing=checkpointing)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(tokens()).logits  # the chunked loss is no part of what is compiled
    logits.square().sum().backward()
    torch.testing.assert_close(logits, model(tokens()).logits)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_parameter_gets_a_gradient(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="float32")
    model(tokens(8, 32), tokens(8, 32)).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_norm_is_computed_in_float32() -> None:
    norm = LlamaRMSNorm(64, 1e-6).bfloat16()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), exact.bfloat16())


def test_a_compiled_layer_keeps_the_sum_that_both_norms_read(tmp_path: Path) -> None:
    """Not what attention adds, which takes as much memory and has to be added again at every use."""
    model = built(write_config(tmp_path), dtype="float32")
    assert isinstance(model, LlamaForCausalLM)
    kept: list[set[object]] = []

    def outputs_of(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        kept.append({node.target for node in graph.graph.output_node().all_input_nodes})
        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")
    backend = aot_autograd(fw_compiler=outputs_of, bw_compiler=outputs_of, partition_fn=partition)
    model.compile_layers(backend)
    model(tokens(), tokens()).loss_sum.backward()
    assert torch.ops.peft_pretraining.saved_sum.default in kept[0]


def test_a_process_may_compile_many_models(tmp_path: Path) -> None:
    """PyTorch's own limit is eight kinds of layers."""
    torch.compiler.reset()
    for heads in range(1, 11):
        sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
        model = built(write_config(tmp_path, **sizes), dtype="bfloat16")
        assert isinstance(model, LlamaForCausalLM)
        model.compile_layers(backend="eager")
        model(tokens(), tokens()).loss_sum.backward()


@pytest.mark.slow
def test_a_compiled_layer_makes_that_sum_together_with_the_norm(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="bfloat16")
    assert isinstance(model, LlamaForCausalLM)
    torch.compiler.reset()
    with fresh_cache():
        model.compile_layers()
        _, codes = run_and_get_code(lambda: model(tokens(), tokens()).loss_sum.backward())
        # What was compiled serves the next model of this shape: it would be refused after eight.
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        other = built(write_config(tmp_path), dtype="bfloat16", seed=1)
        assert isinstance(other, LlamaForCausalLM)
        other.compile_layers()
        other(tokens(), tokens()).loss_sum.backward()
        assert compiled > 0 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    lines = [line for code in codes for line in code.splitlines() if "saved_sum" in line]
    assert any("fused" in line for line in lines)
    assert not any("torch.ops.peft_pretraining.saved_sum.default(" in line for line in lines), "a kernel of its own"


@pytest.mark.slow
def test_a_compiled_layer_pads_no_rows(tmp_path: Path) -> None:
    """As it would where they are no multiple of 128 bytes: a gradient must fit where its input was."""
    model = built(write_config(tmp_path, intermediate_size=1032), dtype="bfloat16")
    assert isinstance(model, LlamaForCausalLM)
    torch.compiler.reset()
    with fresh_cache(), torch._inductor.config.patch(disable_padding_cpu=False):
        model.compile_layers()
        _, codes = run_and_get_code(lambda: model(tokens(), tokens()).loss_sum.backward())
    assert any("1032" in code for code in codes) and not any("1088" in code for code in codes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpointing", "int8 activations"])
def test_the_gradient_of_a_compiled_layers_input_takes_the_place_of_its_outputs(tmp_path: Path, kind: str) -> None:
    model = built(write_config(tmp_path), dtype="bfloat16")
    assert isinstance(model, LlamaForCausalLM)
    convert_linears(model, low_rank_names(model), WeightFormat(bits=8))
    groups = low_rank_param_groups(model, low_rank_names(model), rank=8, subspace="streaming")
    QGaLoreAdamW8bit(groups, lr=1e-3).attach(model)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        model.keep_int8_activations()
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    layer, tables = model.model.layers[0], rotary_tables(16, 8, 1e4, x.device)

    def gradient(given: torch.Tensor) -> torch.Tensor:
        torch.compiler.reset()
        with fresh_cache(), torch._functorch.config.patch(donated_buffer=True):
            model.compile_layers()
            assert model.model.compiled_layer is not None
            out = model.model.compiled_layer(layer, x, *tables)
            return torch.autograd.grad(out, [x], given, retain_graph=True)[0]  # PyTorch refuses it for donated ones

    given = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    if kind == "checkpointing":
        assert gradient(given).data_ptr() == given.data_ptr()
        return
    with mock.patch.object(GivesUpGradients, "__call__", lambda self, graph: None):
        expected = gradient(before := given.clone())
    assert expected.data_ptr() != before.data_ptr() and torch.equal(before, given)
    found = gradient(given)
    assert found.data_ptr() == given.data_ptr() and torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [256, 250, 32])
def test_attention_of_a_compiled_layer_repeats_its_bits(
    head_dim: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    config = LlamaConfig.from_json(ROOT / "configs/llama_60m.json")
    config = dataclasses.replace(config, head_dim=head_dim, num_attention_heads=8, num_key_value_heads=8)
    torch.manual_seed(0)
    with torch.device("cuda"):
        attention = LlamaAttention(config).bfloat16()
    x = torch.randn(64, length, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tables = rotary_tables(length, head_dim, 1e4, x.device)
    grad_output = torch.randn_like(x)

    def gradients() -> list[torch.Tensor]:
        out = attention(x, *tables)
        return [out.detach(), *torch.autograd.grad(out, [x, *attention.parameters()], grad_output)]

    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # PyTorch alone would take FlashAttention then
    try:
        expected = gradients()
        attention.cudnn_length = cudnn_length(x.device, config)
        if not attention.cudnn_length:
            pytest.skip("cuDNN's attention is for Hopper alone")
        found = gradients()
        repeated = [gradients() for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * float(theirs.abs().max()))
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), "not cuDNN's"
    assert all(all(map(torch.equal, again, found)) for again in repeated)


def test_cudnn_attends_only_where_its_bits_were_seen_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(capability: tuple[int, int], has_cudnn: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: has_cudnn)

    config, cuda = LlamaConfig.from_json(ROOT / "configs/llama_60m.json"), torch.device("cuda", 0)
    machine((9, 0))
    assert cudnn_length(cuda, config) == 256
    assert cudnn_length(cuda, dataclasses.replace(config, num_key_value_heads=4)) == 0
    assert cudnn_length(cuda, dataclasses.replace(config, head_dim=80)) == 0
    assert cudnn_length(torch.device("cpu"), config) == 0
    machine((9, 0), has_cudnn=False)
    assert cudnn_length(cuda, config) == 0
    machine((8, 0))
    assert cudnn_length(cuda, config) == 0


def test_rotary_tables_stay_float32_whatever_the_model_is_cast_to(tmp_path: Path) -> None:
    model = built(write_config(tmp_path), dtype="float32").to(torch.bfloat16)
    assert not list(model.buffers())
    cos, sin = rotary_tables(64, 8, 10000.0, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos[63, 1], torch.tensor(63 * 10000 ** (-2 / 8)).cos())
    torch.testing.assert_close(sin[63, 0], torch.tensor(63.0).sin())


def test_hf_rotary_frequencies_survive_the_build(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = built(write_config(tmp_path), True, "bfloat16")
    assert isinstance(model, HFCausalLM)
    assert all(buffer.dtype == torch.float32 and not buffer.is_meta for buffer in model.buffers())


class TestMaterialize:
    def test_values_depend_on_seed_and_name_only(self, tmp_path: Path) -> None:
        path = write_config(tmp_path)
        state = built(path, dtype="float32", seed=7).state_dict()
        longer = built(write_config(tmp_path, num_hidden_layers=4), dtype="float32", seed=7).state_dict()
        half = built(path, dtype="bfloat16", seed=7).state_dict()
        other = built(path, dtype="float32", seed=8).state_dict()
        for name, value in state.items():
            assert torch.equal(value, longer[name]), name
            assert torch.equal(value.bfloat16(), half[name]), name
            assert torch.equal(value, other[name]) == name.endswith("norm.weight"), name
        matrices = [value for value in state.values() if value.ndim == 2]
        assert len({value.flatten()[:8].sum().item() for value in matrices}) == len(matrices)

    def test_leaves_the_global_generator_alone(self, tmp_path: Path) -> None:
        before = torch.get_rng_state()
        built(write_config(tmp_path))
        assert torch.equal(before, torch.get_rng_state())

    def test_distribution_is_the_one_of_transformers(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, hidden_size=192, vocab_size=1000, initializer_range=0.02)
        for name, value in built(path, dtype="float32").state_dict().items():
            if value.ndim == 1:
                assert torch.equal(value, torch.ones_like(value)), name
            else:
                bound = 4 / value.numel() ** 0.5  # four standard errors
                assert abs(value.mean() / 0.02) < bound, name
                assert abs(value.std() / 0.02 - 1) < bound, name

    def test_hook_sees_each_module_before_the_next_exists(self, tmp_path: Path) -> None:
        model = build_on_meta(write_config(tmp_path))
        seen: list[str] = []

        def swap(whole: nn.Module, name: str) -> None:
            module = whole.get_submodule(name)
            assert not any(parameter.is_meta for parameter in module.parameters(recurse=False))
            later = [n for n, p in whole.named_parameters() if not p.is_meta]
            assert len(later) <= len(seen) + 1
            seen.append(name)
            if name.endswith("up_proj"):
                parent, _, child = name.rpartition(".")
                setattr(whole.get_submodule(parent), child, nn.Identity())

        materialize(model, "cpu", torch.float32, 0, swap)
        assert "model.embed_tokens" in seen and "lm_head" in seen and "model.layers.2.mlp.down_proj" in seen
        assert isinstance(model.model.layers[1].mlp.up_proj, nn.Identity)
        assert not any(parameter.is_meta for parameter in model.parameters())

    def test_a_replaced_module_leaves_no_float_weight_behind(self, tmp_path: Path) -> None:
        import weakref

        alive: list[weakref.ref[torch.Tensor]] = []

        def swap(whole: nn.Module, name: str) -> None:
            assert sum(reference() is not None for reference in alive) == 0
            if name.endswith("_proj"):
                alive.append(weakref.ref(whole.get_submodule(name).weight))
                parent, _, child = name.rpartition(".")
                setattr(whole.get_submodule(parent), child, nn.Identity())

        build_model(ModelArgs(str(write_config(tmp_path))), on_module=swap)
        assert len(alive) == 21

    @pytest.mark.parametrize("use_hf", [False, True])
    def test_tied_head_stays_tied(self, tmp_path: Path, use_hf: bool) -> None:
        if use_hf:
            pytest.importorskip("transformers")
        model = built(write_config(tmp_path, tie_word_embeddings=True), use_hf)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        config = LlamaConfig.from_json(tmp_path / "tiny.json")
        assert parameter_count(model) == config.parameter_count()


def test_low_rank_names_are_the_decoder_matrices(tmp_path: Path) -> None:
    path = write_config(tmp_path, num_key_value_heads=2)
    model = build_on_meta(path)
    shapes = LlamaConfig.from_json(path).matrix_shapes()
    names = low_rank_names(model)
    assert sorted(names) == sorted(f"model.layers.{i}.{name}" for i in range(3) for name in shapes)
    for name in names:
        assert tuple(model.get_submodule(name).weight.shape) == shapes[name.split(".", 3)[3]]


def test_low_rank_names_refuses_other_models() -> None:
    with pytest.raises(TypeError, match="Linear is no CausalLM"):
        low_rank_names(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "changes", [{"model_type": "no-such-model"}, {"hidden_size": "48"}, {"hidden_size": 47}, {"num_hidden_layers": 0}]
)
def test_hf_model_reports_what_transformers_refuses(tmp_path: Path, changes: dict[str, object]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"tiny\.json: (transformers refuses it|it has no layers)"):
        build_on_meta(write_config(tmp_path, **changes), use_hf_model=True)


def test_own_model_is_picked_by_default(tmp_path: Path) -> None:
    assert isinstance(build_on_meta(write_config(tmp_path)), LlamaForCausalLM)
