"""The passes of one update of a training run: operations and bytes of each, counted from the model's shape.

An update is a list of passes, one after another. A pass is either a matrix product, which reads its operands from
memory and writes its result there, or everything between two products, fused: each input read once, each output written
once. Operations are those of matrix products, two for a multiplication and an addition, all at the rate of bfloat16,
even the few in float32 that refresh a subspace. Not counted: the norms' weights and statistics, random bits, zeros that
pad a ragged matrix, and the eigenvectors of `--subspace svd`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft_pretraining.models.config import ModelConfig
from peft_pretraining.models.ops.linear_cross_entropy import token_chunks
from peft_pretraining.speed.passes import (
    FP8_SPEED,
    GROUP_SIZE,
    Pass,
    Passes,
    dequantize,
    moved,
    product,
    product_in_fp8,
    product_in_int8,
    quantized_bytes,
    round_to_8_bits,
    side_of,
    times,
)
from qgalore.config import FLOAT_PRODUCTS, FP8_GRADIENTS, FP8_PRODUCTS
from qgalore.kernels import fp8_width
from qgalore.layer.linear import GROUPED_WEIGHT_BYTES
from qgalore.subspace.fit import projects_directly
from qgalore.subspace.methods import GROUPED_BASIS_BYTES
from qgalore.update.newton_schulz import method_of, multiply_adds, segments_of

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
    rank: int  # 0: nothing is projected
    grad_accum: int = 1  # micro-batches an update
    checkpointing: bool = False
    length: int = 256  # tokens a sequence
    update_proj_gap: int = 200
    float32_logits: bool = False  # AdamW's, in memory
    checkpoint_every: int = 1  # with checkpointing one in so many layers is computed again
    checkpoint_layers: int = 0  # or so many, if that is not 0
    tensors: tuple[tuple[str, int], ...] = ()  # or of these names of `TENSORS` in so many layers
    int8_activations: bool = False
    weight_bits: int | None = 8  # None: float weights
    basis_bits: int | None = 4
    sum_bytes: int = 1  # of a value of a sum over micro-batches; 1: INT8 in groups
    direction: str = "adam"
    newton_schulz: str = "muon"
    has_fp8: bool = True  # the card: by that "auto" chooses the method
    products: int = FLOAT_PRODUCTS  # forward and for the gradients of inputs
    head_products: int = FLOAT_PRODUCTS

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch * self.length

    @property
    def rounds_products(self) -> bool:
        """Whether the layers' products are of factors in INT8 or FP8."""
        return self.products != FLOAT_PRODUCTS

    @property
    def recomputed(self) -> int:
        """Layers that are computed again."""
        layers = self.config.num_hidden_layers
        in_part = min(self.checkpoint_layers, layers) or -(-layers // self.checkpoint_every)
        return in_part if self.checkpointing else 0

    @property
    def rounded(self) -> int:
        """Layers that round gate and up, if any do."""
        return self.config.num_hidden_layers - max(self.recomputed, dict(self.tensors).get("mlp", 0))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of each matrix of a decoder layer."""
        return list(self.config.matrix_shapes().values())

    @property
    def widths(self) -> tuple[int, int, int]:
        """Values per token of the residual stream, of the queries and of the keys."""
        c = self.config
        return c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


# ---- a layer and a micro-batch: forward and backward


def decoder_products(s: Setting) -> Passes:
    """x Wᵀ of each matrix; g W and the full gradient gᵀ x have as many operations and bytes."""
    return [product(s.tokens, n, m) for m, n in s.shapes]


def forward_products(s: Setting) -> Passes:
    """x Wᵀ of each matrix as the layers make it; matrices with one input share what is rounded of it."""
    if not s.rounds_products:
        return decoder_products(s)
    shapes = s.config.matrix_shapes().items()
    hidden, query, _ = s.widths
    own = [query, *(width for width in (hidden, hidden, s.config.intermediate_size) if not rounds_within(s, width))]
    return [
        *(round_to_8_bits(s.tokens, n) for n in own),
        *(product_of_8_bits(s)(s.tokens, n, m) for _, (m, n) in shapes),
    ]


def product_of_8_bits(s: Setting) -> Callable[[int, int, int], Pass]:
    """The pass of the layers' products where they round their factors."""
    return product_in_fp8 if s.products >= FP8_PRODUCTS else product_in_int8


def rounds_within(s: Setting, width: int) -> bool:
    """Whether the pass that makes an input of so many values a token, a norm or SwiGLU, rounds it as well."""
    return s.products >= FP8_PRODUCTS and fp8_width(width) == width


def weights_as_factors(s: Setting, shapes: list[tuple[int, int]]) -> Passes:
    """What makes factors of the stored weights of these shapes."""
    if s.weight_bits:
        return [dequantize(m, n, s.weight_bits, 1 if s.rounds_products else 2) for m, n in shapes]
    return [round_to_8_bits(m, n) for m, n in shapes if s.rounds_products]


def merges_input_gradients(s: Setting) -> bool:
    """Whether the library computes the input gradients of queries and keys in one product."""
    hidden, query, key = s.widths
    names = [name for name in s.config.matrix_shapes() if name.endswith(_WITH_ONE_INPUT[0][:2])]
    return len(names) == 2 and not s.rounds_products and 2 * (query + key) * hidden <= GROUPED_WEIGHT_BYTES


_OF_TENSORS = (
    ("residual", ("o_proj",)), ("qkv", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")),
)  # fmt: skip
"""The matrices that make what `--recompute` names."""
_WITH_ONE_INPUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)
"""Names of matrices, by what they multiply, in the models whose products share work. A family may have others."""


def shapes_by_input(s: Setting) -> list[tuple[bool, list[tuple[int, int]]]]:
    """The shapes of the matrices with one input each, and whether they begin with queries and keys.

    A matrix whose name nothing is known of counts as the only one of its input.
    """
    left, found = dict(s.config.matrix_shapes()), []
    for ends in _WITH_ONE_INPUT:
        names = [name for name in left if name.endswith(ends)]
        queries_and_keys = [name.endswith(end) for name, end in zip(names, ends, strict=False)][:2] == [True, True]
        found.append((queries_and_keys and ends == _WITH_ONE_INPUT[0], [left.pop(name) for name in names]))
    return [each for each in found if each[1]] + [(False, [shape]) for shape in left.values()]


def whole_gradients(s: Setting) -> Passes:
    """gᵀ x of each matrix; factors that are rounded are read twice, first for the scales of their columns."""
    if s.products != FP8_GRADIENTS:
        return decoder_products(s)
    shapes = s.config.matrix_shapes().items()
    own = [n for name, (_, n) in shapes if not name.endswith(("k_proj", "v_proj", "up_proj"))]
    rounded = [moved(5 * s.tokens * width) for width in (*own, *(m for m, _ in s.shapes))]
    return [*rounded, *(product_in_fp8(m, s.tokens, n) for m, n in s.shapes)]


def input_gradients(s: Setting) -> Passes:
    """g W of each matrix; in one product for queries and keys if they are small."""
    hidden, query, key = s.widths
    if s.rounds_products:
        rounded = [round_to_8_bits(s.tokens, m) for m, _ in s.shapes]
        fused = s.shapes
        if s.products >= FP8_PRODUCTS:  # all matrices with one input
            fused = [(sum(m for m, _ in each), each[0][1]) for _, each in shapes_by_input(s)]
        return [*rounded, *(product_of_8_bits(s)(s.tokens, m, n) for m, n in fused)]
    if not merges_input_gradients(s):
        return decoder_products(s)
    others = [shape for name, shape in s.config.matrix_shapes().items() if not name.endswith(("q_proj", "k_proj"))]
    return [product(s.tokens, query + key, hidden), *(product(s.tokens, m, n) for m, n in others)]


def projected_gradients(s: Setting) -> Passes:
    """gᵀ x of each matrix, projected, in the library's order; products that share an input are merged."""
    passes = []
    for queries_and_keys, shapes in shapes_by_input(s):
        direct = [projects_directly(s.tokens, *shape, s.rank, side_of(*shape)[0]) for shape in shapes]
        side, width, _ = side_of(*shapes[0])
        merged = all(direct) and side == "right" and 2 * s.rank * width <= GROUPED_BASIS_BYTES
        side_by_side = queries_and_keys and not any(direct[:2])  # their gradients
        if merged:
            passes.append(product(s.tokens, width, s.rank * len(shapes)))
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
    forward: list[float] = [4 * hidden, rotary, 3 * inter, 4 * hidden]  # add and norm, rotary, SwiGLU, add and norm
    for index, width in ((0, hidden), (2, inter), (3, hidden)):
        forward[index] -= width / 2 if rounds_within(s, width) else 0  # a byte for two
    # The gradient of a norm adds those of the products behind it, three or two, and the residual's.
    backward = [(5 if merged else 6) * hidden, rotary, 5 * inter, 5 * hidden]
    if s.products >= FP8_PRODUCTS:
        backward = [4 * hidden, rotary, 5 * inter, 4 * hidden]
    return [moved(2 * s.tokens * w) for w in forward], [moved(2 * s.tokens * w) for w in backward]


def recompute(s: Setting, quantized: bool) -> Passes:
    """The passes that checkpointing repeats: all but down_proj and the sum after it, which no gradient needs."""
    return [each for passes in recompute_tensors(s, quantized).values() for each in passes]


def recompute_tensors(s: Setting, quantized: bool) -> dict[str, Passes]:
    """The same by the tensors that they make, as `--recompute` names them (`models.activations`).

    A product makes a value of b bytes in 2 in_features operations, so that one with the model's width h takes 2 h / b
    a byte, be it of queries or of gate: 4,096 in bfloat16 for LLaMA-7B. Fused attention makes a value in 2 L in
    sequences of L tokens, but reads its inputs: of 256 tokens it is what each byte saves the most time with.
    """
    hidden, query, key_value = s.widths
    # The first has norm and rotation, the sum has its norm, gate and up their product.
    widths = {
        "qkv": (2 * hidden, 2 * (query + key_value)),
        "residual": (4 * hidden,),
        "mlp": (3 * s.config.intermediate_size,),
    }
    found = {"attention": [attention(s)[0]]}
    for name, of_matrices in _OF_TENSORS:
        shapes = [shape for each, shape in s.config.matrix_shapes().items() if each.endswith(of_matrices)]
        rounds = quantized and s.rounds_products
        product_of = product_of_8_bits(s) if rounds else product
        passes = [_round_input(s, name)] if rounds else []
        passes += [product_of(s.tokens, n, m) for m, n in shapes]
        passes += [moved(2 * s.tokens * each) for each in widths[name]]
        found[name] = passes + (weights_as_factors(s, shapes) if quantized else [])
    return found


def _round_input(s: Setting, tensor: str) -> Pass:
    """The pass that rounds what the product of a tensor reads: attention's output, or that of a norm."""
    hidden, query, _ = s.widths
    if tensor == "residual":
        return round_to_8_bits(s.tokens, query)
    # Of the norms the backward pass needs what is not rounded, too.
    return moved(s.tokens * hidden) if rounds_within(s, hidden) else round_to_8_bits(s.tokens, hidden)


def rounded_activations(s: Setting) -> Passes:
    """Writing gate and up in INT8 beside the product that is made of them; reading codes instead saves nothing."""
    return [moved(2 * s.tokens * s.config.intermediate_size)] if s.int8_activations else []


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
        passes += _head_products(s, chunk, sum_bytes)
    if s.head_products >= FP8_PRODUCTS:  # both forms of the weight, of which the second is read twice
        passes += [round_to_8_bits(vocabulary, hidden), moved(5 * vocabulary * hidden)]
    return passes


def _head_products(s: Setting, chunk: int, sum_bytes: int) -> Passes:
    """The products and the loss of so many tokens; sum_bytes: moved for a value of the weight's gradient."""
    hidden, vocabulary = s.config.hidden_size, s.config.vocab_size
    loss, weight = moved(4 * chunk * vocabulary), [product(vocabulary, chunk, hidden, sum_bytes)]
    if s.head_products < FP8_PRODUCTS:
        return [product(chunk, hidden, vocabulary), loss, product(chunk, vocabulary, hidden), *weight]
    if s.head_products == FP8_GRADIENTS:
        rounded = [moved(5 * chunk * width) for width in (vocabulary, hidden)]
        added = moved((2 + sum_bytes) * vocabulary * hidden)  # what the product has written
        weight = [*rounded, product_in_fp8(vocabulary, chunk, hidden), added]
    forward = [round_to_8_bits(chunk, hidden), product_in_fp8(chunk, hidden, vocabulary)]
    backward = [product_in_fp8(chunk, vocabulary, hidden), moved(4 * chunk * hidden)]
    return [*forward, moved(5 * chunk * vocabulary), *backward, *weight]  # the loss writes its gradient's codes, too


def whole_head(s: Setting) -> Passes:
    """All logits at once, kept for the backward pass."""
    hidden, vocabulary = s.config.hidden_size, s.config.vocab_size
    forward, backward = (6, 6) if s.float32_logits else (2, 4)
    loss = [moved(nbytes * s.tokens * vocabulary) for nbytes in (forward, backward)]
    return [*loss, *times([product(s.tokens, hidden, vocabulary)], 3)]


# ---- the update


def gradient_shapes(s: Setting) -> list[tuple[int, int]]:
    """The shape of each gradient of a layer, projected where there is a rank."""
    if not s.rank:
        return s.shapes
    return [(s.rank, n) if side_of(m, n)[0] == "left" else (m, s.rank) for m, n in s.shapes]


def sum_nbytes(rows: int, columns: int, value_bytes: int) -> int:
    """The bytes of a sum of gradients, in INT8 where a value has one byte."""
    return quantized_bytes(rows, columns, 8) if value_bytes == 1 else value_bytes * rows * columns


def gradient_sums(rows: int, columns: int, count: int, value_bytes: int = 1) -> Passes:
    """Sums of `count` bfloat16 gradients; nothing for one, which is kept as it is."""
    stored = sum_nbytes(rows, columns, value_bytes)
    return [moved(2 * rows * columns * count + stored * (2 * count - 1))] if count > 1 else []


def adam8bit(rows: int, columns: int, gradient: int, result_bytes: int, moments: int = 2) -> Passes:
    """The check that a gradient of so many bytes is finite, then Adam, which moves `result_bytes` for each value, too.

    moments: 1 where a direction keeps the momentum alone.
    """
    values = rows * columns
    states = moments * (values + 4 * -(-values // GROUP_SIZE))
    return [moved(gradient), moved(gradient + 2 * states + result_bytes * values)]


def orthogonalize(s: Setting, rows: int, columns: int) -> Pass:
    """Newton-Schulz of a momentum: each step reads it and a product of its size and writes it.

    In FP8 it reads it in two bytes and, for two products, in one, and writes four: in 16 bits and twice in FP8.
    """
    method = method_of(s.newton_schulz, min(rows, columns), lambda _: s.has_fp8)
    steps = len(method.polynomials)
    segments = segments_of((rows, columns), steps) if method.segmented else (1,) * steps
    operations, values = 2 * multiply_adds((rows, columns), segments), len(segments) * rows * columns
    return (
        Pass(operations / FP8_SPEED, 8 * values, bytes_after=4 * values) if method.fp8 else Pass(operations, 6 * values)
    )


def directions(s: Setting) -> Passes:
    """The directions of a layer's matrices from their gradients: Adam's, or an orthogonalized momentum."""
    passes, adam = [], s.direction == "adam"
    for rows, columns in gradient_shapes(s):
        gradient = 2 * rows * columns if s.grad_accum == 1 else sum_nbytes(rows, columns, s.sum_bytes)
        passes += adam8bit(rows, columns, gradient, 2, moments=2 if adam else 1)
        passes += [] if adam else [orthogonalize(s, rows, columns)]
    return passes


def project_back(s: Setting, m: int, n: int) -> Pass:
    """Project the direction back, add it to the weight and round that, in one pass."""
    _, short, long = side_of(m, n)
    stored = quantized_bytes(m, n, s.weight_bits) if s.weight_bits else 2 * m * n
    direction = 2 * s.rank * (short + long) if s.rank else 2 * m * n
    return Pass(2 * m * n * s.rank, direction + 2 * stored)


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
    store = moved(basis + (quantized_bytes(rank, short, s.basis_bits) if s.basis_bits else 2 * rank * short))
    sketches = [test, *times(sketch, s.grad_accum), *gradient_sums(rank, short, s.grad_accum, s.sum_bytes)]
    return [*sketches, *times(cholesky, CHOLESKY_PASSES), gram, store, change, rotation, rotation]


# ---- whole updates


def _shared(s: Setting, quantized: bool) -> Update:
    """The passes of both methods over all layers and micro-batches; `quantized`, ours, merges some products."""
    count = s.grad_accum * s.config.num_hidden_layers
    forward, backward = pointwise(s, quantized and merges_input_gradients(s))
    return {
        FORWARD: times(forward_products(s) if quantized else decoder_products(s), count),
        RECOMPUTE: times(recompute(s, quantized), s.grad_accum * s.recomputed) + _in_part(s, quantized),
        INPUT_GRADIENTS: times(input_gradients(s) if quantized else decoder_products(s), count),
        ATTENTION: times(attention(s), count),
        POINTWISE: times([*forward, *backward], count)
        + times(rounded_activations(s), s.grad_accum * s.rounded)
        + times(ends(s), s.grad_accum),
    }


def _in_part(s: Setting, quantized: bool) -> Passes:
    parts = recompute_tensors(s, quantized) if s.tensors else {}
    return [each for name, count in s.tensors for each in times(parts[name], s.grad_accum * count)]


def q_galore(s: Setting) -> Update:
    """The passes of our training."""
    layers, count = s.config.num_hidden_layers, s.grad_accum * s.config.num_hidden_layers
    table = (s.config.vocab_size, s.config.hidden_size)
    weights = weights_as_factors(s, s.shapes)
    bases = [dequantize(s.rank, min(shape), s.basis_bits) for shape in s.shapes if s.basis_bits and s.rank]
    sums = [p for shape in gradient_shapes(s) for p in gradient_sums(*shape, s.grad_accum, s.sum_bytes)]
    table_gradient = 2 * table[0] * table[1] if s.grad_accum == 1 else sum_nbytes(*table, s.sum_bytes)
    update = _shared(s, quantized=True) | {
        WEIGHT_GRADIENTS: times(projected_gradients(s) if s.rank else whole_gradients(s), count),
        HEAD: times(chunked_head(s), s.grad_accum),
        # Weights for the forward and for the input gradients; bases for each gradient, and for an update of several.
        DEQUANTIZE: times(weights, 2 * count) + times(bases, count + (layers if s.grad_accum > 1 else 0)),
        SUMS: times(sums, layers) + times(gradient_sums(*table, s.grad_accum, s.sum_bytes), 2),
        PROJECT_BACK: times([project_back(s, m, n) for m, n in s.shapes], layers),
        ADAM: times(directions(s), layers),
        TABLES: times(adam8bit(*table, table_gradient, 4), 2),
        REFRESH: times([p for m, n in s.shapes for p in refresh(s, m, n) if s.rank], layers / s.update_proj_gap),
    }
    return {name: update[name] for name in COMPONENTS if update.get(name)}


def adamw(s: Setting, in_chunks: bool = False) -> Update:
    """Compiled AdamW, fused, on bfloat16 weights, gradients and states; in_chunks: with our loss at the head."""
    layers, tables = s.config.num_hidden_layers, 2 * s.config.vocab_size * s.config.hidden_size
    decoder = layers * sum(m * n for m, n in s.shapes)
    update = _shared(s, quantized=False) | {
        WEIGHT_GRADIENTS: times(decoder_products(s), s.grad_accum * layers),
        HEAD: times(chunked_head(s) if in_chunks else whole_head(s), s.grad_accum),
        SUMS: [moved(6 * (decoder + tables) * (s.grad_accum - 1))] if s.grad_accum > 1 else [],
        ADAM: [moved(14 * decoder)],
        TABLES: [moved(14 * tables)],
    }
    return {name: update[name] for name in COMPONENTS if update.get(name)}


def all_passes(update: Update) -> Passes:
    """The passes of all components."""
    return [p for passes in update.values() for p in passes]
