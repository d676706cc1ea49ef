"""Bytes that come and go during an update: for each phase what is alive at its worst moment, beside what lasts.

They are those of the tensors that the code on a GPU makes, with fused attention and norms, and that inductor makes of
compiled layers. An MLP is taken to be 2.5 times as wide as the model: attention counts only in layers that are computed
again. CUDA graphs have memory of their own, which between replays the loss and refreshes from Python take: their phases
are as without graphs, over activations that stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from peft_pretraining.memory.fp8_gradients import forms_gradient
from peft_pretraining.memory.planned_run import Matrix, PlannedRun
from peft_pretraining.models.ops.linear_cross_entropy import logits_width, token_chunks, training_bytes
from peft_pretraining.models.ops.swiglu import group_size_of
from qgalore.graphs.dequant_cache import CACHE_BYTES
from qgalore.kernels import GROUP_LIMIT
from qgalore.layer.layout import padded_width
from qgalore.layer.linear import columns_bytes, fused_product_bytes, product_bytes
from qgalore.sharding.looked_up_rows import gathered_bytes
from qgalore.subspace import fit
from qgalore.update.directions import DIRECTIONS
from qgalore.update.newton_schulz import Method, method_of, segments_of
from qgalore.update.rounding_feedback import BYTES_PER_VALUE

ROWS_OF_ALL = "gradient of the embeddings, with rows of all ranks"
"""The phase in which ranks send one another the rows that were looked up."""
_ROWS = 4 * (1 << 22)  # float32 rows that a float weight is updated in
_BYTES_SENT = 2  # of a value of an INT8 sum on its way to other ranks


class PassingBytes:
    """The phases of one run's update."""

    def __init__(self, run: PlannedRun) -> None:
        """Hidden states between layers, an activation of the MLP, the head's table; what graphs hold dequantized."""
        args, config, self.run, self.itemsize = run.args, run.config, run, run.dtype.itemsize
        self.options, self.format = args.subspace, args.quantization.weight_format
        self.layers = layers = config.num_hidden_layers
        width = padded_width(config.intermediate_size) if args.optimizer.is_low_rank else config.intermediate_size
        self.hidden, self.wide = run.tokens * config.hidden_size * self.itemsize, run.tokens * width * self.itemsize
        self.table = config.vocab_size * config.hidden_size * self.itemsize
        kept = args.kept_activations
        self.recomputed = kept.recomputed(layers)
        self.tensors = kept.recomputed_tensors(layers)
        """In how many first layers the tensors of these names are recomputed (`models.activations`)."""
        self.int8_activations = kept.int8_activations and run.compiled
        self.int8_states, self.int8_sums = "8bit" in args.optimizer.optimizer, run.sum_dtype.itemsize == 1
        self.quantized = self.format.stored_bits is not None and not self.format.int8_products
        self.converts = self.options.proj_quant or self.format.stored_bits is not None
        dequantizes = self.quantized and not self.format.fp8_products
        self.weights = self._cached(math.prod(map(padded_width, x.shape)) for x in run.matrices if dequantizes)
        self.bases = self._cached(x.bases for x in run.matrices if self.options.proj_quant)
        # The loss cannot take the graphs' memory where the head's gradient outlives the layers' backward pass.
        self.loss_has_own_memory = run.graphs and (
            config.tie_word_embeddings or not (run.args.updates_immediately or self.int8_sums)
        )
        self.kept = self._kept_from(0) + self.hidden + (4 + 8 + 8) * run.tokens
        """What the backward pass keeps: layers, their output, one float32 a token of the norm, ids and labels."""

    def _cached(self, values: Iterable[int]) -> int:
        total = self.itemsize * sum(values)
        return total if self.run.graphs and total <= CACHE_BYTES else 0

    def phases(self) -> dict[str, int]:
        """The moments that can be the peak, in the order in which an update comes to them."""
        run, config, update = self.run, self.run.config, self.update_of_table()
        of_table = self.table + (update if run.args.updates_immediately else self.read_of_table())
        # The gradient of the last layer's output takes the place of that output, which graphs keep; a tied head's
        # gradient waits for that of the embeddings.
        stays, waits = self.kept + self.hidden * run.graphs, self.table * config.tie_word_embeddings
        loss = self.loss()
        head = self.kept + self.hidden + of_table
        found = {"activations and loss": self.kept + loss, "activations and gradient of the head": head}
        beside = {} if self.loss_has_own_memory else self.of_layers()
        found |= {name: stays + waits + beside.get(name, 0) for name in self.of_layers()}
        if waits:
            found["gradients of head and embeddings"] = (stays if run.graphs else self.hidden) + waits + of_table
        if rows := self.rows_of_embeddings():
            sent = self.table + self.read_of_table() + rows
            found[ROWS_OF_ALL] = (stays if run.graphs else self.hidden) + sent
        if not run.args.updates_immediately:
            found["update of the largest weight"] = max(self.updates(), update)
        return found

    def loss(self, stays: bool = False) -> int:
        """What the head's loss takes with gradients; a head that is gathered for it gives its memory to its gradient.

        But for a sum in its own dtype, which several chunks of tokens make beside it. stays: whether another loss needs
        the head after it.
        """
        run, config = self.run, self.run.config
        products = run.args.quantization.head_products
        loss = training_bytes(run.tokens, config.hidden_size, config.vocab_size, run.dtype, products)
        chunks = token_chunks(run.tokens, logits_width(config.vocab_size) * self.itemsize)
        beside = stays or (len(chunks) > 1 and self.itemsize >= 4)
        return loss + self.table * (run.gathers_tables and beside)

    def read_of_table(self) -> int:
        """Of the gradient of embeddings or head: what leaves an INT8 sum, in float32, or to be sent in bfloat16."""
        run, values = self.run, self.table // self.itemsize
        is_sent = run.args.world_size > 1 and not run.args.owners_sum  # as a whole
        return (_BYTES_SENT * values if is_sent else min(_ROWS, 4 * values)) if self.int8_sums else 0

    def rows_of_embeddings(self) -> int:
        """Rows that ranks send one another for the whole gradient of the embeddings; 0 where they do not."""
        run, config = self.run, self.run.config
        if config.tie_word_embeddings or not run.deals_tables:
            return 0
        of_sum = _BYTES_SENT if self.int8_sums else run.sum_dtype.itemsize
        itemsize = self.itemsize if run.args.owners_sum else of_sum  # owners get it as the backward pass makes it
        shape = (config.vocab_size, config.hidden_size)
        return gathered_bytes(shape, itemsize, run.args.tokens_sent_at_once, run.shards)

    def update_of_table(self) -> int:
        """That, and rows of a direction, or all of it where blocks of an 8-bit state straddle them."""
        run, float32 = self.run, self.table // self.itemsize * 4
        rows = float32 if self.int8_states and run.config.hidden_size % 256 else min(_ROWS, float32)
        return self.read_of_table() + (rows // 4 * self._by_bitsandbytes() if run.by_bitsandbytes else rows)

    def kept_by_graphs(self) -> int:
        """What nothing else uses: over ranks also three messages of a layer's gradients, one with sums of a refresh."""
        run, kept = self.run, max(self.of_layers().values()) if self.loss_has_own_memory else 0
        if run.args.world_size > 1 and run.args.updates_immediately:
            values = sum(x.gradient for x in run.matrices) + 2 * run.config.hidden_size  # of the norms
            full = max(x.size for x in run.matrices) if self.options.subspace == "svd" else 0
            kept += self.itemsize * (3 * values + max(full, sum(x.bases for x in run.matrices)))
        return kept

    def messages(self) -> int:
        """The gradients of a layer that are sent while those of the next one are made."""
        return 2 * self.itemsize * sum(x.gradient + x.residual for x in self.run.matrices)

    # ---- layers

    def layer(self, recomputed: bool = False) -> int:
        """What autograd keeps of one decoder layer between forward and backward.

        Each norm: its input and one float32 a token. Attention: rotated queries and keys, values, output and the
        float32 log-sum-exp of each head. MLP: gate and up, perhaps in INT8. Uncompiled also the norms' outputs,
        silu(gate) and the product. Of factors and adapters what lies between the two, and inputs behind a dropout.
        """
        # The product of each matrix's input and a factor.
        factors = self.run.rank_of_factors * self.itemsize * len(self.run.matrices)
        factors += self.run.dropped_values * self.itemsize + self.run.dropout_masks
        parts = sum(self.parts(recomputed).values())
        return self.hidden + self.run.tokens * (4 * 2 + factors) + parts + self.between() * (not self.run.compiled)

    def parts(self, recomputed: bool = False) -> dict[str, int]:
        """Of these bytes those that `--recompute` may spare, by the names of `models.activations`."""
        config, heads = self.run.config, self.run.config.num_attention_heads
        size = group_size_of(self.wide // self.itemsize) if self.int8_activations and not recomputed else None
        query, key_value = (count * config.head_dim * self.itemsize for count in (heads, config.num_key_value_heads))
        return {
            "attention": self.run.tokens * (query + 4 * heads),
            "residual": self.hidden,
            "qkv": self.run.tokens * (query + 2 * key_value),
            "mlp": 2 * self.wide if size is None else 2 * (self.wide // self.itemsize) * (size + 2) // size,
        }

    def between(self) -> int:
        """What an uncompiled layer keeps that a compiled one makes again: norms' outputs, silu(gate), the product."""
        return 2 * (self.hidden + self.wide)

    def _kept_from(self, first: int) -> int:
        """What the layers from this index on keep."""
        again = sum(index >= first for index in self.recomputed)
        found = again * self.hidden + (self.layers - first - again) * self.layer()
        parts, in_part = self.parts(), {name: max(0, count - first - again) for name, count in self.tensors.items()}
        if not self.run.compiled:  # a layer of which a part is recomputed keeps nothing but the other parts
            found -= max(in_part.values()) * (self.between() + 2 * 4 * self.run.tokens)
        return found - sum(count * parts[name] for name, count in in_part.items())

    def _recomputed_in(self, index: int) -> list[str]:
        return [name for name, count in self.tensors.items() if index < count]

    def of_layers(self) -> dict[str, int]:
        """What the backward pass of the layers takes by its moments, beside all activations: in the graphs' memory."""
        run, backward = self.run, self.backward(recomputed=False)
        above = self.layers - 1 - self.recomputed[-1] if self.recomputed else 1
        parts = [self._again_in_part(count - 1) for count in {*self.tensors.values()} - {0, len(self.recomputed)}]
        if self.recomputed:
            # A compiled layer has both norms' outputs by then; layers above have given up theirs, but not to graphs.
            again = self.layer(recomputed=True) + (1 if run.compiled else -1) * self.hidden
            again += self.backward(recomputed=True) - self._given_up_above(self.recomputed[-1])
            backward = again if len(self.recomputed) == self.layers else max(again, backward)
        backward = max(backward, *parts, 0)
        # Where graphs run a layer and several matrices are due, their sketches wait for the end of its backward pass.
        due = math.ceil(self.layers * len(run.matrices) / self.options.shortest_interval)
        waiting = min(due, len(run.matrices)) - 1 if run.graphs and run.args.updates_immediately else 0
        sketches = (
            self.itemsize * max(x.bases for x in run.matrices) * (waiting if self.options.subspace != "svd" else 0)
        )
        found = {"activations and backward of one layer": backward + sketches}
        if run.args.sums_in_momentum and run.args.world_size > 1 and not run.args.owners_sum:  # in float32, as sent
            found["activations and sum of a momentum over ranks"] = 8 * max(x.size for x in run.matrices)
        if run.args.updates_immediately:
            gradients = sum(
                (4 if self.int8_sums else self.itemsize) * x.gradient + self.itemsize * x.residual for x in run.matrices
            )
            if not run.graphs:  # the layer has given up what it saved, and there is the gradient of its input
                gradients += self.hidden - (self.layer() if above else self.hidden)
            found["activations and updates of one layer"] = gradients + self.updates() + sketches
        return found

    def _given_up_above(self, index: int) -> int:
        """What layers above this one had kept, whose backward passes are over; but graphs keep their memory."""
        return 0 if self.run.graphs else self._kept_from(index + 1)

    def _again_in_part(self, index: int) -> int:
        """Inside the backward pass of a layer that recomputes some tensors, beside all activations.

        Each tensor is made again where the backward pass comes to it: for the MLP gate and up, and the sum before them
        with what that is made of; then for attention its inputs and output. The norm's output that gate and up, or
        queries, keys and values are made of waits for the gradients of their weights.
        """
        names, parts, backward = (
            self._recomputed_in(index),
            self.parts(recomputed=True),
            self.backward(recomputed=False),
        )
        above = self._given_up_above(index)
        if not self.run.compiled:  # the whole layer runs again, but for products that it has kept
            return sum(parts[name] for name in names) + self.between() + backward - above
        again = {name: parts[name] + self.hidden * (name in ("mlp", "qkv")) for name in names}
        for_sum = [name for name in ("residual", "attention", "qkv") if name in again] if "residual" in again else []
        if "attention" not in for_sum:
            for_sum = for_sum[:1]
        of_mlp = again.get("mlp", 0) + sum(again[name] for name in for_sum)
        # By then gate and up have been given up, if it was the layer that kept them.
        kept = 0 if "mlp" in again or self.run.graphs else self.parts()["mlp"]
        of_attention = again.get("qkv", 0) + again.get("attention", 0) + self._gradients_of_attention() - kept
        return max(of_mlp + backward, of_attention + self.weights + self.bases) - above

    def _gradients_of_attention(self) -> int:
        """Gradients of five inputs, of queries, keys and values, those of queries in float32, and projected ones."""
        run, config = self.run, self.run.config
        queries, others = (
            config.num_attention_heads * (self.itemsize + 4),
            2 * config.num_key_value_heads * self.itemsize,
        )
        return 5 * self.hidden + run.tokens * config.head_dim * (queries + others) + 3 * self._made()

    def _made(self) -> int:
        """Of the largest matrix the gradients that wait for its update."""
        matrix = self._largest()
        return self.itemsize * (matrix.gradient + matrix.residual) if self.run.args.updates_immediately else 0

    def _largest(self) -> Matrix:
        return max(self.run.matrices, key=lambda x: (x.size, -x.shape[0]))  # down_proj

    def backward(self, recomputed: bool) -> int:
        """Inside the backward pass of a layer, beside what is kept and the gradient of the layer's output.

        down_proj: the product or its gradient, and what multiplying or projecting takes. SwiGLU: gradients of product,
        gate and up, and the product. A compiled layer writes one of them over what it has saved, unless graphs run it
        again, or it has saved INT8 codes. up_proj: gradients of gate and up, the norm's output and its gradient, and a
        weight or a projection, beside the projected gradients made so far. Attention: gradients of five inputs, of
        queries, keys and values, and those of the queries in float32.
        """
        run, matrix, made = self.run, self._largest(), self._made()
        weight = 0 if self.weights else product_bytes(self.format, matrix.shape, run.tokens, run.dtype)
        if run.args.method.method == "qlora":  # dequantized as a whole
            weight = self.itemsize * matrix.size
        multiplying = max(weight, self.projecting(matrix))
        fused = 0
        if self.format.fp8_products:  # of gate and up at once, whose shape is that of down turned
            fused = fused_product_bytes([matrix.shape[::-1]] * 2, run.tokens)
        if recomputed and run.compiled:
            worst = self._gradients_of_attention() - 2 * self.wide
            worst = max(worst, 2 * self.hidden + fused + 2 * made if fused else 0)
        elif run.graphs or self.int8_activations:
            worst = max(4 * self.wide, 2 * (self.wide + self.hidden) + max(multiplying, fused) + made)
        else:
            worst = (3 if run.compiled else 2) * self.wide
        return self.weights + self.bases + max(self.wide + multiplying, worst)

    def projecting(self, matrix: Matrix) -> int:
        """A gradient with bases, and what makes it: a projected factor, or all of it, or a sketch where one is due."""
        result = self.itemsize * (matrix.gradient + (0 if self.bases else self.converts * matrix.bases))
        if not matrix.sides:
            return result + (columns_bytes(matrix.shape, self.run.tokens) if self.format.fp8_weight_gradients else 0)
        tokens = self.run.tokens
        formed = forms_gradient(self.run.args, tokens, matrix)
        factor, momentum = self.itemsize * tokens * matrix.rank, 4 * matrix.gradient if self.int8_states else 0
        # Of a sketch: the momentum in float32, and scaled; that and its product with a factor.
        refresh = self.itemsize * matrix.gradient + max(momentum, factor + self.itemsize * matrix.bases)
        return result + max(self.itemsize * matrix.size if formed else len(matrix.sides) * factor, refresh)

    def updates(self) -> int:
        """At most, beside the gradients: directions of matrices that are updated as a batch, or a refresh of one."""
        run, largest = self.run, max(x.gradient for x in self.run.matrices)
        if not run.args.optimizer.is_low_rank:
            rows = min(_ROWS, 4 * largest)
            return rows // 4 * self._by_bitsandbytes() if run.by_bitsandbytes else rows
        one_by_one = run.args.updates_immediately and not run.updates_whole_layers
        layers = 1 if run.args.updates_immediately else self.layers
        limit = 0 if one_by_one else DIRECTIONS[self.options.direction].batch_values
        total = sum(x.gradient for x in run.matrices) * layers
        values, cached = min(total, limit + largest), self.bases if run.args.updates_immediately else 0
        read = 4 * values if self.int8_sums and not (run.args.updates_immediately or run.args.sums_in_momentum) else 0
        steps = self.directions(values, largest, GROUP_LIMIT, bool(cached)) + read
        return cached + max(steps + max(map(self._applying, run.matrices)), *map(self.refresh, run.matrices))

    def directions(self, values: int, largest: int, grouped: int, cached: bool) -> int:
        """Of matrices with so many values in all, so many of which are orthogonalised at once.

        cached: bases are dequantized already, and counted.
        """
        run, matrices = self.run, self.run.matrices
        if self.options.direction != "adam":
            # Momenta, two buffers, and two squares a matrix, in segments four; in FP8 one buffer and three of half the
            # size, and one square and two of half the size. A GPU is taken for one that has FP8.
            shapes = [x.gradient_shape for x in matrices]
            methods = [method_of(self.options.newton_schulz, min(shape), lambda _: run.cuda) for shape in shapes]
            made = values + math.ceil((2.5 if any(method.fp8 for method in methods) else 2.0) * values)
            made += max(map(_squares, methods, shapes)) * grouped
        else:
            bases = sum(x.bases for x in matrices) * values // sum(x.gradient for x in matrices)
            made = values + (0 if cached else self.converts * bases)
        if self.options.momentum_rank:  # one momentum in float32 and bfloat16, beside those that are made
            made = max(made, values + (4 + self.itemsize) * largest // self.itemsize)
        return run.dtype.itemsize * made

    def _by_bitsandbytes(self) -> int:
        """Bytes a value of an update by bitsandbytes, beside the sum of its gradient.

        The gradient in the dtype of the weights, unless it is so, while it is scaled in float32; then with copies of
        weight and codes as they were, which are put back where the update is skipped. On a CPU nothing has to be put
        back.
        """
        run, clips = self.run, self.run.args.optimizer.grad_clipping or self.run.args.optimizer.norm_growth
        grad = 0 if run.sum_dtype == run.dtype and not clips else self.itemsize
        return max((4 if clips else 0) + grad, grad + (self.itemsize + 2 if run.cuda else 0))

    def _applying(self, matrix: Matrix) -> int:
        """Beside direction and bases: the whole direction of a residual; factors and rows of a float weight.

        Or what feeding rounding errors into the momentum takes.
        """
        if self.options.rounding_feedback:
            return BYTES_PER_VALUE * matrix.size
        one_side = len(matrix.sides) < 2
        if matrix.residual or (self.quantized and one_side):
            return 2 * fit.wide_dtype(self.run.dtype).itemsize * matrix.residual
        on_tensor_cores = self.run.cuda and self.itemsize == 2 and one_side
        return (0 if on_tensor_cores else 4 * (matrix.gradient + matrix.bases)) + min(_ROWS, 4 * matrix.size)

    def refresh(self, matrix: Matrix) -> int:
        """The sketch, an orthonormal basis made of it, then the new one and rotated moments."""
        if not matrix.sides:
            return 0
        if self.options.subspace == "svd":  # the gradient in float32 and float64, and eigenvectors, without a workspace
            return 12 * matrix.size + 24 * min(matrix.shape) ** 2
        wide = fit.wide_dtype(self.run.dtype).itemsize
        bases, square, rotated = matrix.bases, matrix.rank**2, (2 * wide if self.int8_states else 8) * matrix.gradient
        changing = (wide + 1) * bases + wide * square + rotated
        return self.itemsize * bases + max((self.itemsize + 12) * bases + 8 * square, changing)


def _squares(method: Method, shape: tuple[int, int]) -> int:
    """Values of the squares of one matrix."""
    segments = segments_of(shape, len(method.polynomials)) if method.segmented else (1,)
    return (4 if max(segments) > 1 else 2) * min(shape) ** 2
