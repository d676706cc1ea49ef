"""LLaMA for pretraining: a causal language model and nothing else.

Method: RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020), grouped-query
attention (Ainslie et al. 2023), as put together in LLaMA (Touvron et al. 2023); biases in attention as the config says.
Parameter names are those of transformers' LlamaForCausalLM, so a state dict fits both; the arithmetic agrees with it
within rounding.

Numbers: norms, rotations, softmax and loss are computed in float32 and rounded once; everything else has the
parameters' dtype. There are no buffers: the rotary tables are computed in each forward, a few small kernels, so no cast
of the model can round them and a model built on the meta device has nothing left to fill in.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_pretraining.models.activations import ACTIVATIONS
from peft_pretraining.models.head import CausalLMOutput, head_output
from peft_pretraining.models.llama.config import LlamaConfig
from peft_pretraining.models.network import CausalLM, LayerRunner, Tables, TablesHere
from peft_pretraining.models.ops.rotary import rotary_tables, rotate
from peft_pretraining.models.ops.swiglu import swiglu, swiglu_through_int8
from peft_pretraining.models.selective_checkpoint import Contexts, contexts, makes
from qgalore.layer.linear import LowRankLinear, grouped_linear
from qgalore.torch_internals import internal, set_for_process


class LlamaRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 inside."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The fused operator keeps only x and one float32 a token for the backward; written out, it would keep
        # several float32 copies of x.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


_MOST_KINDS_OF_LAYERS = 128
"""That may be compiled in one process: of all its models, by shapes, formats and what is recomputed."""


def cudnn_length(device: torch.device, config: LlamaConfig) -> int:
    """Up to which length of sequence cuDNN's attention is fast and gives the same bits every time; 0: none.

    On Hopper its backward pass takes two thirds of FlashAttention's time, and adds up the gradient of a query in
    whatever order blocks of keys finish. Of 256 tokens there are two such blocks, and a + b is b + a: 40 of 40 backward
    passes were equal there, and none of 512 tokens (cuDNN 9.19, head_dim 64 and 128).
    """
    grouped = config.num_key_value_heads != config.num_attention_heads
    if device.type != "cuda" or grouped or config.head_dim not in (64, 128) or not torch.backends.cudnn.is_available():
        return 0
    return 256 if torch.cuda.get_device_capability(device) == (9, 0) else 0


# x + y that a compiler takes for something it cannot compute again. It would keep y instead, which takes as much
# memory, and read both wherever the sum is needed: in the backward pass once more for the gradients of both norms.
_library = torch.library.Library("peft_pretraining", "FRAGMENT")
_library.define("saved_sum(Tensor x, Tensor y) -> Tensor")


@torch.library.impl(_library, "saved_sum", "CompositeExplicitAutograd")
def _saved_sum(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@torch.library.register_fake("peft_pretraining::saved_sum")
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


torch.library.register_autograd("peft_pretraining::saved_sum", lambda ctx, grad: (grad, grad))


class LlamaAttention(nn.Module):
    """Causal self-attention; `num_key_value_heads` keys and values are shared by groups of query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.cudnn_length = 0
        """Sequences up to this length are trained through cuDNN's attention."""
        query = config.num_attention_heads * config.head_dim
        key_value = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.has_bias("q_proj"))
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=config.has_bias("k_proj"))
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=config.has_bias("v_proj"))
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.has_bias("o_proj"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        # The rotation gives the gradients of queries and keys as adjacent columns.
        with makes("qkv"):
            of_heads = grouped_linear(x, (self.q_proj, self.k_proj, self.v_proj), adjacent=2)
        query, key, value = (y.view(heads) for y in of_heads)
        with makes("qkv", on_the_way=True):
            query, key = rotate(query, key, cos, sin)  # (B, L, heads, head_dim), (B, L, kv_heads, head_dim) as value
        # Transposed views: the output then has the queries' layout, and its heads join again without a copy.
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        with makes("attention"):
            if torch.is_grad_enabled() and length <= self.cudnn_length and x.dtype == torch.bfloat16:
                out = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, True)[0]
            else:
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        with makes("residual", on_the_way=True):
            mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.training_swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu

    def forward(self, x: Tensor) -> Tensor:
        activation = self.training_swiglu if torch.is_grad_enabled() else swiglu
        with makes("mlp"):
            gate, up = grouped_linear(x, (self.gate_proj, self.up_proj))
        out: Tensor = self.down_proj(activation(gate, up))
        return out


class LlamaDecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recomputed: tuple[str, ...] = ()
        """Names of `ACTIVATIONS` that are computed again in the backward pass."""
        self.add_attention: Callable[[Tensor, Tensor], Tensor] = torch.add

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether all is computed again."""
        return self.recomputed == ACTIVATIONS

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.recomputed or not torch.is_grad_enabled():
            return self._run(x, cos, sin)
        # There is no dropout, so the random state need not be kept for the second forward.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        compiling = torch.compiler.is_compiling()
        # What a custom autograd.Function does, as products of codes are, PyTorch computes again only where a policy
        # says so (2.11; 2.13 has one of its own for all that is computed again).
        if self.recomputed != ACTIVATIONS or (compiling and self._multiplies_codes):
            options["context_fn"] = self._compiled_contexts if compiling else self._contexts
        out: Tensor = checkpoint(self._run, x, cos, sin, **options)
        return out

    @property
    def _multiplies_codes(self) -> bool:
        layer = self.mlp.down_proj
        return isinstance(layer, LowRankLinear) and layer.format.fp8_products

    def recompute(self, names: Collection[str]) -> None:
        """From now on compute the activations of these names again in the backward pass."""
        self.recomputed = tuple(name for name in ACTIVATIONS if name in names)
        self._contexts: Contexts = contexts(self.recomputed, compiled=False)
        self._compiled_contexts: Contexts = contexts(self.recomputed, compiled=True)

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        added = self.self_attn(self.input_layernorm(x), cos, sin)
        with makes("residual"):
            x = self.add_attention(x, added)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class LlamaModel(nn.Module):
    """Embeddings, decoder layers, final norm: token ids (B, L) to hidden states (B, L, hidden_size)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # No padding_idx: it would stop one row from training, silently so where a tokenizer uses that id for text.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled_layer: Callable[..., Tensor] | None = None
        self.run_layers: LayerRunner | None = None
        self.token_tables: Tables = TablesHere()

    def embed(self, input_ids: Tensor) -> Tensor:
        """The input (B, L, hidden_size) of the first layer."""
        with self.token_tables.whole(self.embed_tokens.weight):
            x: Tensor = self.embed_tokens(input_ids)
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        cos, sin = self.tables(input_ids.shape[1])
        # Batches of training have one shape; an evaluation's may have others, each of which would be compiled.
        training = torch.is_grad_enabled()
        if training and self.run_layers is not None:
            x = self.run_layers(x, cos, sin)
        else:
            for layer in self.layers:
                x = self.compiled_layer(layer, x, cos, sin) if training and self.compiled_layer else layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """The rotary tables of sequences of so many tokens, each (length, head_dim / 2)."""
        config, device = self.config, self.embed_tokens.weight.device
        return rotary_tables(length, config.head_dim, config.rope_theta, device, config.rope_scaling)


class LlamaForCausalLM(CausalLM):
    """LLaMA with a language-model head, tied to the embeddings if the config says so."""

    config: LlamaConfig
    matrix_names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    # Between the three matrices of the MLP a ragged width stays padded: nothing is copied there.
    padded_outputs = ("gate_proj", "up_proj")
    table_names = ("model.embed_tokens.weight", "lm_head.weight")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def gradient_checkpointing_enable(self, layers: Collection[int] | None = None) -> None:
        """See `CausalLM`."""
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, LlamaDecoderLayer)
            layer.recompute(ACTIVATIONS if layers is None or index in layers else ())

    def recompute(self, counts: Mapping[str, int]) -> None:
        """See `CausalLM`."""
        for index, layer in enumerate(self.model.layers):
            assert isinstance(layer, LlamaDecoderLayer)
            layer.recompute([name for name, count in counts.items() if index < count])

    def recomputes(self, name: str) -> bool:
        """See `CausalLM`."""
        layer = self.get_submodule(".".join(name.split(".")[:3]))  # model.layers.0
        return isinstance(layer, LlamaDecoderLayer) and layer.gradient_checkpointing

    def keep_int8_activations(self) -> None:
        """From now on keep gate and up of each MLP in INT8 (`swiglu`), but for what is recomputed anyway."""
        for layer in self.model.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            if "mlp" not in layer.recomputed:
                layer.mlp.training_swiglu = swiglu_through_int8

    def multiply_head_in_fp8(self, products: int) -> None:
        """See `CausalLM`."""
        self.head_products = products

    def compile_layers(self, backend: str = "inductor") -> None:
        """From now on run training through `torch.compile`, one decoder layer at a time.

        The layers share their code, so one compilation serves them all and takes seconds for any depth. Checkpointing
        is inside it: only what a gradient needs is computed again. The gradient of a layer's output is used up by the
        backward pass: that of the input takes its place.
        """
        # which loads inductor
        from peft_pretraining.models.compile import GivesUpGradients, allow_selective_checkpoints, recomputes_random

        # Norms and products of elements are computed again in the backward pass rather than kept, for a quarter less
        # memory and 1 to 4 % of the speed.
        set_for_process("torch._functorch.config.ban_recompute_materialized_backward", False)
        # A ninth kind of layer in one process, as in a notebook that tries several models, would be an error.
        set_for_process("torch._dynamo.config.recompile_limit", _MOST_KINDS_OF_LAYERS)
        allow_selective_checkpoints()
        device = self.lm_head.weight.device
        if device.type == "cpu":
            set_for_process("torch._functorch.partitioners.has_recomputable_rng_ops", recomputes_random)
        options: dict[str, Any] = {}
        if backend == "inductor":
            # Same seed, same bits: no choice between kernels by how fast they happen to run. And what is freed goes
            # back to the allocator at once, instead of waiting for a tensor of its size. Rows are not padded to 128
            # bytes: where they were, a gradient could not be written over what it is made of.
            options = {"deterministic": True, "allow_buffer_reuse": False, "comprehensive_padding": False}
            options |= {"post_grad_custom_post_pass": GivesUpGradients()}
            # Its code generator takes the saved sum for any other, and makes it together with the norm that follows.
            register = internal("torch._inductor.lowering.register_lowering")
            register(torch.ops.peft_pretraining.saved_sum.default, type_promotion_kind=None)(
                internal("torch._inductor.lowering.lowerings")[torch.ops.aten.add.Tensor]
            )
        for layer in self.model.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            layer.add_attention = torch.ops.peft_pretraining.saved_sum
            layer.self_attn.cudnn_length = cudnn_length(device, self.config)
        self.model.compiled_layer = torch.compile(
            LlamaDecoderLayer.forward, fullgraph=True, dynamic=False, backend=backend, options=options
        )

    @property
    def compiled_layer(self) -> Callable[..., Tensor] | None:
        """See `CausalLM`."""
        return self.model.compiled_layer

    def run_layers_by(self, runner: LayerRunner) -> None:
        """See `CausalLM`."""
        self.model.run_layers = runner

    @property
    def tables(self) -> Tables:
        """See `CausalLM`."""
        return self.model.token_tables

    def bring_tables_by(self, tables: Tables) -> None:
        """See `CausalLM`."""
        self.model.token_tables = tables

    def embed(self, input_ids: Tensor) -> Tensor:
        """See `CausalLM`."""
        return self.model.embed(input_ids)

    def layer_constants(self, length: int) -> tuple[Tensor, ...]:
        """See `CausalLM`: the rotary tables."""
        return self.model.tables(length)

    def head_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """See `CausalLM`."""
        loss_sum = self._head(self.model.norm(x), labels).loss_sum
        assert loss_sum is not None
        return loss_sum

    def _head(self, hidden: Tensor, labels: Tensor | None) -> CausalLMOutput:
        with self.model.token_tables.whole(self.lm_head.weight) as spent:
            return head_output(hidden, self.lm_head, labels, self.head_products, spent)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        """See `CausalLM`."""
        hidden = self.model(input_ids)
        layers = self.model.run_layers
        # The head's gradient waits for that of the embeddings where they are one.
        if layers is None or labels is None or not torch.is_grad_enabled() or self.config.tie_word_embeddings:
            return self._head(hidden, labels)
        with layers.graph_pool():
            output = self._head(hidden, labels)
        assert output.loss_sum is not None
        return CausalLMOutput(None, output.loss_sum.clone())
