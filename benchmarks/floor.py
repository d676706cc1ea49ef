"""The least time that one update can take: operations over the rate of the tensor cores, bytes over the bandwidth.

    python -m benchmarks.floor --models 60m,7b --tflops 790 --tbps 3.0

An update is a list of passes, one after another, and each takes the longer of its two times. A pass is either a matrix
product, which reads its operands from memory and writes its result there, or everything between two products, fused:
each input read once, each output written once. A better kernel comes closer to this floor; only a kernel that merges
passes, such as a product that reads INT8 weights, can be faster. Operations are those of matrix products,
two for a multiplication and an addition, all at the rate of bfloat16, even the few in float32 that refresh a subspace.
Not counted: launches, the norms' weights and statistics, random bits, zeros that pad a ragged matrix.

Ours is what `q_galore` of `compare.py` trains: INT8 weights, INT4 bases, 8-bit states, a streaming subspace, the loss
in chunks. AdamW is `adamw_compiled`: bfloat16 weights, gradients and states, all logits at once. The compiler leaves
those in bfloat16 and converts them in registers; `--float32_logits` counts them as float32 in memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks import models
from benchmarks.passes import (
    GROUP_SIZE,
    TBPS,
    TFLOPS,
    Ceilings,
    Pass,
    Passes,
    dequantize,
    moved,
    product,
    quantized_bytes,
    seconds,
    side_of,
    times,
)
from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.ops.linear_cross_entropy import token_chunks
from qgalore.layer.linear import GROUPED_WEIGHT_BYTES
from qgalore.subspace.fit import projects_directly
from qgalore.subspace.methods import GROUPED_BASIS_BYTES

CHOLESKY_PASSES = 2

COMPONENTS = (
    FORWARD, RECOMPUTE, INPUT_GRADIENTS, WEIGHT_GRADIENTS, HEAD, ATTENTION, POINTWISE, DEQUANTIZE, SUMS, PROJECT_BACK,
    ADAM, TABLES, REFRESH,
) = (
    "decoder products, forward", "recompute", "input gradients", "weight gradients (ours projected)", "head and loss",
    "attention", "norms, rotary, SwiGLU, residuals, embedding", "dequantize weights and bases",
    "sums over micro-batches (ours INT8)", "project back and requantize", "AdamW, decoder (ours 8-bit states)",
    "AdamW, embedding and head", "refresh of subspaces",
)  # fmt: skip


Update = dict[str, Passes]
"""The passes of one update by component."""


@dataclass(frozen=True)
class Setting:
    """A model and the options of its training."""

    config: ModelConfig
    micro_batch: int  # sequences
    rank: int
    grad_accum: int = 1  # micro-batches an update
    checkpointing: bool = False
    length: int = 256  # tokens a sequence
    update_proj_gap: int = 200
    float32_logits: bool = False  # AdamW's, in memory

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of each matrix of a decoder layer."""
        return list(self.config.matrix_shapes().values())

    @property
    def widths(self) -> tuple[int, int, int]:
        """Values per token of the residual stream, of the queries and of the keys."""
        c = self.config
        return c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


TARGETS: Mapping[str, tuple[tuple[int, int, int], ...]] = {
    "60m": ((256, 128, 1),),
    "130m": ((128, 256, 1),),
    "350m": ((64, 256, 1),),
    "1b": ((16, 512, 1),),
    "7b": ((16, 1024, 1), (16, 1024, 32)),
    "13b": ((8, 1024, 64),),
}
"""Micro-batch, rank and micro-batches per update of each model."""


# ---- a layer and a micro-batch: forward and backward


def decoder_products(s: Setting) -> Passes:
    """x Wᵀ of each matrix; g W and the full gradient gᵀ x have as many operations and bytes."""
    return [product(s.tokens, n, m) for m, n in s.shapes]


def merges_input_gradients(s: Setting) -> bool:
    """Whether the library computes the input gradients of queries and keys in one product."""
    hidden, query, key = s.widths
    return 2 * (query + key) * hidden <= GROUPED_WEIGHT_BYTES


def input_gradients(s: Setting) -> Passes:
    """g W of each matrix; in one product for queries and keys if they are small."""
    hidden, query, key = s.widths
    if not merges_input_gradients(s):
        return decoder_products(s)
    others = [shape for name, shape in s.config.matrix_shapes().items() if not name.endswith(("q_proj", "k_proj"))]
    return [product(s.tokens, query + key, hidden), *(product(s.tokens, m, n) for m, n in others)]


def projected_gradients(s: Setting) -> Passes:
    """gᵀ x of each matrix, projected, in the library's order; products that share an input are merged."""
    passes = []
    for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        shapes = [shape for name, shape in s.config.matrix_shapes().items() if name.endswith(names)]
        direct = [projects_directly(s.tokens, *shape, s.rank, side_of(*shape)[0]) for shape in shapes]
        side, width, _ = side_of(*shapes[0])
        merged = all(direct) and side == "right" and 2 * s.rank * width <= GROUPED_BASIS_BYTES
        side_by_side = names[0] == "q_proj" and not any(direct[:2])  # the gradients of queries and keys
        if merged:
            passes.append(product(s.tokens, width, s.rank * len(names)))
        if side_by_side:
            passes.append(product(sum(m for m, _ in shapes[:2]), s.tokens, width))
        for index, ((m, n), directly) in enumerate(zip(shapes, direct, strict=True)):
            _, short, long = side_of(m, n)
            if directly:
                passes += [] if merged else [product(s.tokens, short, s.rank)]
                passes.append(product(long, s.tokens, s.rank))
            else:
                passes += [] if side_by_side and index < 2 else [product(m, s.tokens, n)]
                passes.append(product(long, short, s.rank))
    return passes


def attention(s: Setting) -> tuple[Pass, Pass]:
    """Fused causal attention, forward and backward: two products in the forward pass, five in the backward."""
    _, query, key_value = s.widths
    positions = s.micro_batch * s.length * (s.length + 1) // 2
    logsumexp = 4 * s.tokens * s.config.num_attention_heads
    forward = Pass(4 * positions * query, 2 * s.tokens * (2 * query + 2 * key_value) + logsumexp)
    return forward, Pass(10 * positions * query, 2 * s.tokens * (4 * query + 4 * key_value) + logsumexp)


def pointwise(s: Setting, merged: bool) -> tuple[Passes, Passes]:
    """Passes between a layer's products, forward and backward, with the add and norm that follow the layer's end.

    merged: queries and keys have one product for the gradient of their input.
    """
    hidden, query, key_value = s.widths
    inter = s.config.intermediate_size
    rotary = 2 * (query + key_value)
    forward = [4 * hidden, rotary, 3 * inter, 4 * hidden]  # add and norm, rotary, SwiGLU, add and norm
    # The gradient of a norm adds those of the products behind it, three or two, and the residual's.
    backward = [(5 if merged else 6) * hidden, rotary, 5 * inter, 5 * hidden]
    return [moved(2 * s.tokens * w) for w in forward], [moved(2 * s.tokens * w) for w in backward]


def recompute(s: Setting, quantized: bool) -> Passes:
    """The passes that checkpointing repeats: all but down_proj and the sum after it, which no gradient needs."""
    hidden, query, key_value = s.widths
    widths = (2 * hidden, 2 * (query + key_value), 4 * hidden, 3 * s.config.intermediate_size)
    shapes = [shape for name, shape in s.config.matrix_shapes().items() if name != "mlp.down_proj"]
    passes = [product(s.tokens, n, m) for m, n in shapes] + [moved(2 * s.tokens * width) for width in widths]
    return [*passes, attention(s)[0], *(dequantize(m, n, 8) for m, n in shapes if quantized)]


def ends(s: Setting) -> Passes:
    """Embedding and first norm; backward the last norm and the embedding's gradient."""
    hidden = s.config.hidden_size
    values = (3 * s.tokens * hidden, 3 * s.tokens * hidden, (s.tokens + s.config.vocab_size) * hidden)
    return [moved(2 * count) for count in values]


def chunked_head(s: Setting) -> Passes:
    """Logits in chunks of tokens, overwritten by their gradient; the weight's gradient is summed in float32."""
    hidden, vocabulary = s.config.hidden_size, s.config.vocab_size
    chunks = token_chunks(s.tokens, 2 * vocabulary)
    passes = []
    for number, (start, stop) in enumerate(chunks, start=1):
        chunk, sum_bytes = stop - start, (4 if number > 1 else 0) + (2 if number == len(chunks) else 4)
        passes += [product(chunk, hidden, vocabulary), moved(4 * chunk * vocabulary)]
        passes += [product(chunk, vocabulary, hidden), product(vocabulary, chunk, hidden, sum_bytes)]
    return passes


def whole_head(s: Setting) -> Passes:
    """All logits at once, kept for the backward pass."""
    hidden, vocabulary = s.config.hidden_size, s.config.vocab_size
    forward, backward = (6, 6) if s.float32_logits else (2, 4)
    loss = [moved(nbytes * s.tokens * vocabulary) for nbytes in (forward, backward)]
    return [*loss, *times([product(s.tokens, hidden, vocabulary)], 3)]


# ---- the update


def gradient_shapes(s: Setting) -> list[tuple[int, int]]:
    """The shape of each projected gradient of a layer."""
    return [(s.rank, n) if side_of(m, n)[0] == "left" else (m, s.rank) for m, n in s.shapes]


def int8_sums(rows: int, columns: int, count: int) -> Passes:
    """Sums of `count` bfloat16 gradients in INT8; nothing for one, which is kept as it is."""
    stored = quantized_bytes(rows, columns, 8)
    return [moved(2 * rows * columns * count + stored * (2 * count - 1))] if count > 1 else []


def adam8bit(rows: int, columns: int, grad_accum: int, result_bytes: int) -> Passes:
    """The check that a gradient is finite, then Adam, which also moves `result_bytes` for each value."""
    values = rows * columns
    gradient = 2 * values if grad_accum == 1 else quantized_bytes(rows, columns, 8)
    states = 2 * (values + 4 * -(-values // GROUP_SIZE))
    return [moved(gradient), moved(gradient + 2 * states + result_bytes * values)]


def project_back(s: Setting, m: int, n: int) -> Pass:
    """Project the direction back, add it to the INT8 weight and requantize that, in one pass."""
    _, short, long = side_of(m, n)
    return Pass(2 * m * n * s.rank, 2 * s.rank * (short + long) + 2 * quantized_bytes(m, n, 8))


def refresh(s: Setting, m: int, n: int) -> Passes:
    """One refresh of a subspace: sketch, orthonormal rows, new basis, moments rotated into it."""
    _, short, long = side_of(m, n)
    rank, basis = s.rank, 4 * s.rank * short  # bytes in float32
    sketch = [product(s.tokens, long, rank), product(rank, s.tokens, short)]
    test = moved(3 * rank * long)  # the momentum, in bfloat16
    gram = Pass(2 * rank**2 * short, basis + 4 * rank**2)
    cholesky = [moved(2 * basis), gram, Pass(rank**3 / 3, 8 * rank**2), Pass(rank**2 * short, 2 * basis + 4 * rank**2)]
    change = Pass(2 * rank**2 * short, 2 * basis + 4 * rank**2)  # new oldᵀ, for the moments and the similarity
    rotation = Pass(2 * rank**2 * long, 2 * rank * long + 4 * rank**2)
    store = moved(basis + quantized_bytes(rank, short, 4))
    sketches = [test, *times(sketch, s.grad_accum), *int8_sums(rank, short, s.grad_accum)]
    return [*sketches, *times(cholesky, CHOLESKY_PASSES), gram, store, change, rotation, rotation]


# ---- whole updates


def _shared(s: Setting, quantized: bool) -> Update:
    """The passes of both methods over all layers and micro-batches; `quantized`, ours, merges some products."""
    count = s.grad_accum * s.config.num_hidden_layers
    forward, backward = pointwise(s, quantized and merges_input_gradients(s))
    return {
        FORWARD: times(decoder_products(s), count),
        RECOMPUTE: times(recompute(s, quantized), count) if s.checkpointing else [],
        INPUT_GRADIENTS: times(input_gradients(s) if quantized else decoder_products(s), count),
        ATTENTION: times(attention(s), count),
        POINTWISE: times([*forward, *backward], count) + times(ends(s), s.grad_accum),
    }


def q_galore(s: Setting) -> Update:
    """The passes of our training."""
    layers, count = s.config.num_hidden_layers, s.grad_accum * s.config.num_hidden_layers
    table = (s.config.vocab_size, s.config.hidden_size)
    weights = [dequantize(m, n, 8) for m, n in s.shapes]
    bases = [dequantize(s.rank, min(shape), 4) for shape in s.shapes]
    sums = [p for shape in gradient_shapes(s) for p in int8_sums(*shape, s.grad_accum)]
    update = _shared(s, quantized=True) | {
        WEIGHT_GRADIENTS: times(projected_gradients(s), count),
        HEAD: times(chunked_head(s), s.grad_accum),
        # Weights for the forward and for the input gradients; bases for each gradient, and for an update of several.
        DEQUANTIZE: times(weights, 2 * count) + times(bases, count + (layers if s.grad_accum > 1 else 0)),
        SUMS: times(sums, layers) + times(int8_sums(*table, s.grad_accum), 2),
        PROJECT_BACK: times([project_back(s, m, n) for m, n in s.shapes], layers),
        ADAM: times([p for shape in gradient_shapes(s) for p in adam8bit(*shape, s.grad_accum, 2)], layers),
        TABLES: times(adam8bit(*table, s.grad_accum, 4), 2),
        REFRESH: times([p for m, n in s.shapes for p in refresh(s, m, n)], layers / s.update_proj_gap),
    }
    return {name: update[name] for name in COMPONENTS if update.get(name)}


def adamw(s: Setting) -> Update:
    """Compiled AdamW, fused, on bfloat16 weights, gradients and states."""
    layers, tables = s.config.num_hidden_layers, 2 * s.config.vocab_size * s.config.hidden_size
    decoder = layers * sum(m * n for m, n in s.shapes)
    update = _shared(s, quantized=False) | {
        WEIGHT_GRADIENTS: times(decoder_products(s), s.grad_accum * layers),
        HEAD: times(whole_head(s), s.grad_accum),
        SUMS: [moved(6 * (decoder + tables) * (s.grad_accum - 1))] if s.grad_accum > 1 else [],
        ADAM: [moved(14 * decoder)],
        TABLES: [moved(14 * tables)],
    }
    return {name: update[name] for name in COMPONENTS if update.get(name)}


def all_passes(update: Update) -> Passes:
    """The passes of all components."""
    return [p for passes in update.values() for p in passes]


# ---- the tables


def settings(model: str, float32_logits: bool = False) -> list[Setting]:
    """A model's targets, without and with checkpointing."""
    config = models.config(model)
    return [
        Setting(config, *target, checkpointing=checkpointing, float32_logits=float32_logits)
        for target in TARGETS[model]
        for checkpointing in ((True,) if model in ("7b", "13b") else (False, True))
    ]


def summary(models: Sequence[str], ceilings: Ceilings, float32_logits: bool = False) -> str:
    """The floors of all settings as a Markdown table."""
    head = ["model", "rank", "micro-batch", "micro-batches an update", "checkpointing"]
    rows = [[*head, "Q-GaLore ms", "tokens/s", "AdamW ms", "tokens/s"]]
    for model in models:
        for s in settings(model, float32_logits):
            sizes = (s.rank, s.micro_batch, s.grad_accum)
            cells = [model.upper(), *map(str, sizes), "yes" if s.checkpointing else "no"]
            for update in (q_galore(s), adamw(s)):
                time = seconds(all_passes(update), ceilings)
                cells += [f"{time * 1e3:,.1f}", f"{s.tokens * s.grad_accum / time:,.0f}"]
            rows.append(cells)
    return _markdown(rows)


def component_table(s: Setting, ceilings: Ceilings) -> str:
    """The components of a setting with checkpointing as a Markdown table, both methods side by side."""
    updates = (q_galore(s), adamw(s))
    methods = {name: [update.get(name, []) for update in updates] for name in COMPONENTS}
    methods["**floor**"] = [all_passes(update) for update in updates]
    bare = replace(s, checkpointing=False)
    methods["floor without checkpointing"] = [all_passes(update) for update in (q_galore(bare), adamw(bare))]
    rows = [["component", "Q-GaLore 10¹² operations", "GB", "ms", "AdamW 10¹² operations", "GB", "ms"]]
    for name, both in methods.items():
        if any(both):
            rows.append([name, *(cell for passes in both for cell in _cells(passes, ceilings))])
    return _markdown(rows)


def _cells(passes: Passes, ceilings: Ceilings) -> list[str]:
    if not passes:
        return ["-"] * 3
    operations, nbytes = sum(p.operations for p in passes), sum(p.nbytes for p in passes)
    return [f"{operations / 1e12:,.3f}", f"{nbytes / 1e9:,.2f}", f"{seconds(passes, ceilings) * 1e3:,.2f}"]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="floor", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(TARGETS), help="names, separated by commas")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="10^12 bfloat16 operations a second")
    parser.add_argument("--tbps", type=float, default=TBPS, help="10^12 bytes a second, read plus written")
    parser.add_argument("--float32_logits", action="store_true", help="count AdamW's logits as float32 in memory")
    args = parser.parse_args(argv)
    models = args.models.split(",")
    if unknown := [name for name in models if name not in TARGETS]:
        parser.error(f"--models {','.join(unknown)}: there are targets for {', '.join(TARGETS)}")
    if args.tflops <= 0 or args.tbps <= 0:
        parser.error("--tflops and --tbps must be positive")
    ceilings = Ceilings(args.tflops * 1e12, args.tbps * 1e12)
    print(summary(models, ceilings, args.float32_logits))
    for model in models:
        for s in settings(model, args.float32_logits):
            if s.checkpointing:
                print(f"\n{model.upper()}, rank {s.rank}, {s.grad_accum} x {s.micro_batch} sequences, checkpointing:\n")
                print(component_table(s, ceilings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
