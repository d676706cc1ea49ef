"""The flags of `run_pretrain.py`: a frozen dataclass for each group, a field for each flag, its help below it.

The official flags keep their names and defaults, but weight_quant, stochastic_round and proj_quant are on by default
with a q_galore optimizer. A default of 0, "" or None, or one that a flag's `auto` describes, stands for a value that
depends on other flags: `peft_pretraining.config.parse.parse_args` computes it, so that the rest of the program reads
plain values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from peft_pretraining.config.flags import Flag, parse_count, parse_size, parse_whole
from peft_pretraining.data.sources.kind import SourceOptions
from peft_pretraining.data.sources.registry import all_kinds_in_words, default_tokenizers_in_words
from peft_pretraining.models.activations import ACTIVATIONS, in_flag
from qgalore.config import FLOAT_PRODUCTS, FULL, OF_PROJECTIONS, SubspaceConfig, WeightFormat, default_of, subspace_of

LIBRARY_OPTIMIZERS = ("sgd", "adafactor", "muon")
FULL_RANK_OPTIMIZERS = ("adam", "adamw", "adam8bit", *LIBRARY_OPTIMIZERS)
GALORE_OPTIMIZERS = ("galore_adamw", "galore_adamw8bit", "galore_adamw8bit_per_layer")
Q_GALORE_OPTIMIZERS = ("q_galore_adamw8bit", "q_galore_adamw8bit_per_layer")
RECIPES = ("paper", "orthogonal", "full_rank")
METHODS = ("full", "low_rank", "lora", "relora", "qlora")
ADAPTER_METHODS = ("lora", "relora", "qlora")
AUTO = "auto"
"""The word for ranks that are dealt (`peft_pretraining.config.dealt_ranks`)."""
_BY_NAME = "on for q_galore optimizers, off for others"

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16"}


def _dtype(text: str) -> str:
    return _DTYPE_ALIASES.get(text, text)


def _device(text: str) -> str:
    if text == "mps":
        # docs/log has what was looked at.
        raise ValueError(
            "--device mps: GPUs of Apple are not supported. New subspaces are made in float64, which they do not have, "
            "and nothing here has been run on one: give --device cpu"
        )
    return text


def _dimensions_or_share(text: str) -> float:
    numerator, line, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator) if line else float(text)
        if line and value >= 1:
            raise ValueError  # 1/1 is all of a side, and the number 1 one dimension
        return int(value) if value.is_integer() else value
    except (ValueError, ZeroDivisionError):
        raise ValueError("a number of dimensions, or a share of the shorter side such as 1/16") from None


def _updates_or_share(text: str) -> float:
    try:
        value = float(text)
        return value if 0 < value < 1 else parse_whole(text)
    except ValueError:
        raise ValueError("a whole number of updates, or a share of the run below 1 such as 0.1") from None


def _ranks(text: str) -> int | str:
    """A rank, text with several and commas, or auto with one."""
    dealt, colon, text = text.rpartition(":")
    if colon and (dealt != AUTO or text == FULL or "," in text):
        raise ValueError(f"{AUTO}:256 for the bytes of one rank, a whole number,")
    try:
        ranks = [word if word == FULL else parse_whole(word) for word in text.replace(" ", "").split(",")]
        if any(isinstance(rank, int) and rank < 1 for rank in ranks):
            raise ValueError  # no subspace has no dimension
    except ValueError:
        raise ValueError(
            "a whole number of at least 1, several such as 128,256,512 for equal parts of the layers,"
        ) from None
    if colon:
        return f"{AUTO}:{ranks[0]}"
    return ranks[0] if len(set(ranks)) == 1 else ",".join(map(str, ranks))


def _recomputed(text: str) -> str:
    """Names of activations, each with a number of layers if one is given, in their order."""
    counts = dict[str, int]()
    for part in text.replace(" ", "").split(",") if text != "none" else ():
        name, colon, count = part.partition(":")
        try:
            if name not in ACTIVATIONS or name in counts or (colon and parse_whole(count) < 1):
                raise ValueError
            counts[name] = parse_whole(count) if colon else 0
        except ValueError:
            raise ValueError(
                f"names of {', '.join(ACTIVATIONS)}, each perhaps with a number of first layers, such as "
                "attention,mlp:12; or none; all of them are --activation_checkpointing"
            ) from None
    return in_flag(counts)


def _mlp_ranks(text: str) -> int | str:
    if AUTO in text:
        raise ValueError(f"a whole number of at least 1, as --rank {AUTO} deals that of the MLP, too,")
    return 0 if text == "0" else _ranks(text)


@dataclass(frozen=True)
class ModelArgs:
    """The model that is trained."""

    model_config: Annotated[str, Flag("name_or_path", unless="init_from")]
    """The model's JSON configuration: a file such as configs/llama_60m.json, a folder that has a config.json, a size of
    configs/ such as 60m, or the name of a model on the hub."""
    init_from: Annotated[str, Flag("name_or_path", auto="random initial weights")] = ""
    """Weights to begin with, without an optimizer or a place in the data: the folder of a model of this architecture in
    Hugging Face's format, its name on the hub, or a run or checkpoint of this program. Its configuration is the default
    of --model_config and its tokenizer that of --tokenizer. A run that is resumed has its own weights."""
    use_hf_model: bool = False
    """Train transformers' own class of the model, of which any causal one will do, instead of the project's."""
    dtype: Annotated[str, Flag(choices=("bfloat16", "float32", "float16"), parse=_dtype)] = "bfloat16"
    """Data type of float weights and activations; float16, with a loss scale, is for GPUs without bfloat16."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    checkpoint_every: Annotated[int, Flag("layers", at_least=1)] = 1
    """With --activation_checkpointing recompute only one in so many layers: 2 saves half of the memory at half of the
    cost in time."""
    checkpoint_layers: Annotated[int, Flag("layers", at_least=0, auto="as checkpoint_every says")] = 0
    """With --activation_checkpointing recompute the first so many layers alone."""
    recompute: Annotated[str, Flag("tensors", parse=_recomputed)] = ""
    """Recompute some tensors of the decoder layers in the backward pass and keep the others: attention (its output, for
    little time in short sequences), residual (the sum behind it), qkv (queries, keys, values) and mlp (gate and up, the
    widest), each in all layers or, as in attention,mlp:12, in so many first ones. The bits are the same. All four are
    --activation_checkpointing."""
    int8_activations: bool = False
    """Round gate and up of each MLP to INT8 in training: about half of what a compiled layer keeps for its backward
    pass, in half the bytes. Layers that are recomputed do not round."""
    compile: Annotated[str, Flag(choices=("auto", "on", "off"))] = "auto"
    """Compile the decoder layers of the project's own LLaMA with torch.compile; auto: on a CUDA GPU with Triton and
    bfloat16."""

    def recomputed(self, layers: int) -> range:
        """The indices of the layers, of so many, that are wholly recomputed in the backward pass."""
        if not self.activation_checkpointing:
            return range(min(self.recomputed_tensors(layers).values()))
        if self.checkpoint_layers:
            return range(min(self.checkpoint_layers, layers))
        return range(0, layers, self.checkpoint_every)

    def recomputed_tensors(self, layers: int) -> dict[str, int]:
        """In how many first layers, of so many, --recompute recomputes each name of `ACTIVATIONS`."""
        given = [part.partition(":") for part in self.recompute.split(",")]
        counts = {name: min(int(count), layers) if colon else layers for name, colon, count in given}
        return {name: counts.get(name, 0) for name in ACTIVATIONS}

    @property
    def recomputed_in_words(self) -> str:
        """Which layers or tensors those are: none, all, 1 in 3, the first 5, or attention,mlp:12."""
        if not self.activation_checkpointing:
            return self.recompute or "none"
        if self.checkpoint_layers:
            return f"the first {self.checkpoint_layers}"
        return f"1 in {self.checkpoint_every}" if self.checkpoint_every > 1 else "all"

    cuda_graphs: Annotated[str, Flag(choices=("auto", "off"))] = "auto"
    """auto: replay compiled layers from CUDA graphs for galore and q_galore optimizers. The updates are inside the
    graphs, but with several micro-batches, --grad_clipping or an optimizer without _per_layer, graphs sum the gradients
    and updates run from Python. No graphs are used with --simulation, a --weight_group_size that 8 does not divide,
    --grad_accum_dtype int8 with one micro-batch, --sum_in_momentum, --accumulate_by layer, or --residual with updates
    outside. The bits are the same."""


@dataclass(frozen=True)
class DataArgs:
    """The data that it is trained on."""

    dataset: Annotated[str, Flag("name_or_path", listing=all_kinds_in_words)] = "c4"
    """{listing}."""
    tokenizer: Annotated[str, Flag("name_or_path", auto=default_tokenizers_in_words)] = ""
    """Name of a tokenizer on the hub; a folder, a tokenizer.json or a SentencePiece .model; or train:32000 for a BPE of
    so many pieces that is trained on the first documents of the data set."""
    dataset_config: Annotated[str, Flag("name", auto="the only or default one")] = ""
    """Configuration of a data set on the hub, such as sample-10BT."""
    dataset_revision: Annotated[str, Flag("commit", auto="the newest")] = ""
    """Commit, branch or tag of a data set on the hub."""
    train_split: Annotated[str, Flag("name", auto="train")] = ""
    """The data set's own name of its training split."""
    validation_split: Annotated[str, Flag("name", auto="validation, or documents held out of the training split")] = ""
    """The data set's own name of its validation split."""
    text_column: Annotated[str, Flag("name", auto="text, or the only column of strings")] = ""
    """Column or field that holds the text."""
    text_unit: Annotated[str, Flag(choices=("line", "paragraph", "file"))] = "line"
    """The unit of a .txt file that is a document; a paragraph ends at an empty line."""
    repeat: Annotated[str, Flag(choices=("each", "none"))] = "each"
    """each: a data set that ends begins again, in another order; none: the run ends with its data."""
    add_bos: Annotated[bool | None, Flag(auto="as the tokenizer does")] = None
    """Begin each document with the beginning-of-sequence token."""
    add_eos: bool = True
    """End each document with the end-of-sequence token."""
    packing: Annotated[str, Flag(choices=("pad", "pack"))] = "pad"
    """pad: a document a row, as in the paper: what is longer than max_length is cut off, and a shorter one is filled up
    with padding, which takes the time of tokens and is no part of the loss; pack: documents end to end, without
    either."""
    data_lanes: Annotated[int, Flag("logical shards", at_least=1)] = 64
    """Logical shards, the streams of rows that fix the order of the data; the number of ranks must divide it."""
    shuffle_buffer: Annotated[int, Flag("documents", at_least=1)] = 64
    """Documents in the shuffle buffer of each logical shard; 1 keeps the order of the files."""
    workers: Annotated[int, Flag("threads", at_least=0)] = 8
    """Threads per rank that read and tokenize ahead; 0: between updates. They never change the order."""
    damaged_limit: Annotated[int, Flag("places", at_least=0)] = 100
    """Damaged lines and cut-off files that a rank skips before the run stops."""

    @property
    def source_options(self) -> SourceOptions:
        """The options with which the data set is opened."""
        return SourceOptions(
            config=self.dataset_config,
            revision=self.dataset_revision,
            train_split=self.train_split,
            validation_split=self.validation_split,
            text_column=self.text_column,
            text_unit=self.text_unit,
        )


@dataclass(frozen=True)
class BatchArgs:
    """The sequences of an update, which is one optimizer step over the total batch."""

    batch_size: Annotated[int, Flag("sequences", at_least=1)]
    """Sequences in a micro-batch of one rank."""
    gradient_accumulation: Annotated[
        int, Flag("micro_batches", at_least=1, auto="total_batch_size / (batch_size x ranks)")
    ] = 0
    """Micro-batches whose gradients a rank sums before an update."""
    total_batch_size: Annotated[
        int, Flag("sequences", at_least=1, auto="batch_size x gradient_accumulation x ranks")
    ] = 0
    """Sequences per update, over all ranks and micro-batches."""
    max_length: Annotated[int, Flag("tokens", at_least=2)] = 256
    """Length of a sequence."""
    accumulate_by: Annotated[str, Flag(choices=("micro_batch", "layer"))] = "micro_batch"
    """The outer loop of an update. micro_batch: each goes through the whole model, and the sums of all gradients wait
    for the last one. layer: each layer has all micro-batches before the next layer has its first, so that an optimizer
    _per_layer keeps the sums of one layer at a time. Every layer is then computed again in the backward pass, from its
    input in host memory: batch_size x gradient_accumulation x max_length x hidden_size values a layer, which --dry_run
    counts. The bits are the same, but for rounding where the head's weight is that of the embeddings."""


@dataclass(frozen=True)
class OptimizerArgs:
    """The optimizer and its hyperparameters."""

    optimizer: Annotated[
        str, Flag(choices=FULL_RANK_OPTIMIZERS + GALORE_OPTIMIZERS + Q_GALORE_OPTIMIZERS, parse=str.lower)
    ] = "adam"
    """Name of the optimizer, in any case; _per_layer updates each weight inside the backward pass, or after the
    last one where an update has several micro-batches."""
    recipe: Annotated[
        str,
        Flag(
            choices=RECIPES,
            auto="full_rank for q_galore optimizers, but orthogonal beside a rank below full, flags of projections or "
            "direction adam, and paper beside galore_scale or flags of SVDs, unless rank is full, and for weights of "
            "init_from that no orthogonal direction has trained; paper for others",
        ),
    ] = ""
    """Values of the flags that are not given. paper: the official defaults, which this help shows. orthogonal:
    --direction orthogonal, --subspace streaming, --update_proj_gap 200, --rank 7/16 of the model's width, --lr 0.01,
    --galore_scale 0.5, --norm_growth 1.01 (0 with --sum_in_momentum), a --full_rank_lr of twice --lr in up to 800
    updates, falling with the root of their number beyond, and a --weight_decay of which --lr makes 0.0025 an update of
    65,536 tokens or more, in proportion of fewer, or 8 over the updates of the run if that is less; twice that for
    embeddings, head and norms. full_rank: --rank full, --direction normuon, --full_rank_second_moment row, --lr 0.01,
    --galore_scale 0.5, a --full_rank_lr of four times --lr in up to 800 updates, half of it in 3,200, and less with
    the root of their number beyond, a --weight_decay by the same rule with 0.004 for 0.0025, and for embeddings, head
    and norms none of it in up to 800 updates and twice it from 3,200 on."""
    lr: Annotated[float, Flag("rate", above=0)] = 1e-4
    """Peak learning rate."""
    full_rank_lr: Annotated[float | None, Flag("rate", at_least=0, auto="lr")] = None
    """Peak learning rate of embeddings, head and norms."""
    weight_decay: Annotated[float, Flag("rate", at_least=0)] = 0.0
    """Decoupled weight decay, a factor of the learning rate; for adam and sgd it is added to the gradient instead."""
    full_rank_weight_decay: Annotated[float | None, Flag("rate", at_least=0, auto="weight_decay")] = None
    """Weight decay of embeddings, head and norms."""
    cautious_decay: bool = False
    """Leave out the weight decay of values that an update moves away from zero."""
    full_rank_second_moment: Annotated[str, Flag(choices=("value", "row"))] = "value"
    """Adam's second moment of embeddings and head: one a value, or one a row, so that they keep the first alone."""
    beta1: Annotated[float, Flag("ratio", at_least=0, below=1)] = 0.0
    """Decay of the first moment per update; 0 is the optimizer's usual momentum: 0.9 for Adam, 0.95 for muon's
    matrices, none for sgd and adafactor."""
    beta2: Annotated[float, Flag("ratio", above=0, below=1)] = 0.95
    """Decay of Adam's second moment per update, the same in every mode."""
    adam_eps: Annotated[float, Flag("number", above=0)] = 1e-8
    """Epsilon that is added to the root of Adam's second moment."""
    grad_clipping: Annotated[float, Flag("norm", at_least=0)] = 0.0
    """Largest global L2 norm of the gradient; 0 does not clip."""
    norm_growth: Annotated[float, Flag("factor", at_least=0)] = 0.0
    """Largest factor by which the norm of each weight's gradient grows from update to update, such as 1.01; 0 sets no
    limit. It also works inside the backward pass, where grad_clipping cannot."""
    grad_accum_dtype: Annotated[str, Flag(choices=("float32", "bfloat16", "int8"))] = "float32"
    """Data type in which gradients are summed over micro-batches (sgd, adafactor and muon: that of the weights); with
    --sum_in_momentum of embeddings, head and norms alone, since matrices have no sums then."""
    loss_scale: Annotated[float, Flag("factor", at_least=1, at_most=2**24, auto="dynamic")] = 0.0
    """With --dtype float16 a fixed factor on the loss, by which gradients are divided again. The dynamic one is 65536
    at first, half of what it was after an update whose gradient overflowed, which is skipped, and twice after 2,000
    updates without one."""
    adam8bit_backend: Annotated[str, Flag(choices=("auto", "bitsandbytes", "own"))] = "auto"
    """Whose kernels update weights and moments of adam8bit. auto: bitsandbytes on a CUDA GPU where it is installed, but
    for --cautious_decay, --full_rank_second_moment row and --dtype float16, which it does not have; own elsewhere; of a
    run that is resumed, the one that it had. bitsandbytes rounds bfloat16 weights to the nearest, own stochastically.
    The states are the same, so that a run can go on with the other one."""

    @property
    def is_low_rank(self) -> bool:
        """Whether the decoder matrices are trained through projected gradients."""
        return self.optimizer not in FULL_RANK_OPTIMIZERS

    @property
    def is_q_galore(self) -> bool:
        """Whether the optimizer can update quantized weights."""
        return self.optimizer in Q_GALORE_OPTIMIZERS

    @property
    def by_bitsandbytes(self) -> bool:
        """Whether bitsandbytes makes the updates, as far as `adam8bit_backend` is not auto."""
        return self.optimizer == "adam8bit" and self.adam8bit_backend == "bitsandbytes"

    @property
    def per_layer(self) -> bool:
        """Whether each weight is updated inside the backward pass."""
        return self.optimizer.endswith("_per_layer")

    @property
    def adam_beta1(self) -> float:
        """Adam's beta1; a flag of 0 stands for the usual 0.9."""
        return self.beta1 or 0.9

    @property
    def decay_of_full_rank(self) -> float:
        """The weight decay of embeddings, head and norms."""
        return self.weight_decay if self.full_rank_weight_decay is None else self.full_rank_weight_decay

    @property
    def peak_full_rank_lr(self) -> float:
        """The peak learning rate of embeddings, head and norms."""
        return self.lr if self.full_rank_lr is None else self.full_rank_lr


@dataclass(frozen=True)
class MethodArgs:
    """How the decoder's matrices are trained; beside an adapter or factors, embeddings, head, norms and biases train in
    full."""

    method: Annotated[str, Flag(choices=METHODS, parse=str.lower)] = "full"
    """full: as the optimizer has them. low_rank: each is the product of two factors of --rank from the start. lora:
    frozen, beside a trained adapter of --rank. relora: such adapters are merged into the matrices and begin anew every
    relora_every updates. qlora: lora beside matrices that are frozen in qlora_bits bits. The last three need the
    packages of the extra baselines; all but full need adam, adamw, adam8bit, sgd or adafactor."""
    lora_alpha: Annotated[float, Flag("number", above=0)] = 32.0
    """Adapters are multiplied by lora_alpha / rank."""
    lora_dropout: Annotated[float, Flag("share", at_least=0, below=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training. 0 for pretraining, where no text comes twice; papers
    that fine-tune have 0.05."""
    qlora_bits: Annotated[int, Flag(choices=(4, 8))] = 4
    """Bits of qlora's frozen matrices: 4 for NF4 with quantized scales, 8 for LLM.int8()."""
    relora_every: Annotated[int, Flag("updates", at_least=0)] = 0
    """Updates between two merges of relora's adapters, such as a quarter of the run's."""
    relora_warmup: Annotated[int, Flag("updates", at_least=0)] = 50
    """Updates after each merge in which the learning rate grows from 0 back to its schedule."""
    relora_prune: Annotated[float, Flag("ratio", at_least=0, at_most=1)] = 0.99
    """Share of the values of an adapter's optimizer states, the smallest ones, that a merge sets to zero; 1: all."""

    @property
    def has_adapters(self) -> bool:
        """Whether each decoder matrix is frozen beside an adapter."""
        return self.method in ADAPTER_METHODS


@dataclass(frozen=True)
class QuantizationArgs:
    """The stored form of weights."""

    weight_quant: Annotated[bool, Flag(auto=_BY_NAME)] = False
    """Store the decoder matrices as integers of weight_bits (q_galore optimizers only)."""
    weight_bits: Annotated[int, Flag(choices=(8, 4))] = 8
    """Bits in which a weight is stored."""
    weight_group_size: Annotated[int, Flag("weights", at_least=2)] = WeightFormat.group_size
    """Adjacent weights of a row that share a scale and a zero point."""
    int8_products: bool = False
    """Quantize activations to INT8 on the fly and multiply them with the layers' weights in INT8, in the forward pass
    and for the gradients of their inputs; a whole row of a weight then shares its scale, and weight_group_size has no
    effect."""
    fp8_products: bool = False
    """Round activations, gradients and the layers' weights to FP8 (e4m3) on the fly, with a scale for each row, and
    multiply those, in the forward pass and for the gradients of inputs; for a GPU from compute capability 8.9 up (RTX
    40, L4, H100), beside any stored form of the weights."""
    fp8_weight_gradients: bool = False
    """With --fp8_products multiply both factors of a weight's gradient in FP8, too, with a scale for each column, where
    the gradient is formed as a whole, as with --rank full."""
    fp8_head: bool = False
    """With --fp8_products multiply in FP8 where the head makes logits and their gradient that of its input, in
    training; with --fp8_weight_gradients that of its weight, too."""
    stochastic_round: Annotated[bool, Flag(auto=_BY_NAME)] = False
    """Round updated integer weights stochastically, which keeps their mean; otherwise to the nearest."""
    simulation: bool = False
    """Fake quantization: float weights that are rounded onto the integer grid at every update."""

    @property
    def head_products(self) -> int:
        """What the head multiplies in training, as `WeightFormat.products` has it."""
        return self.weight_format.products if self.fp8_head else FLOAT_PRODUCTS

    @property
    def stores_codes(self) -> bool:
        """Whether the decoder's matrices are stored as integers, by flags that may still be refused together."""
        return self.weight_quant and not self.simulation

    @property
    def weight_format(self) -> WeightFormat:
        """The stored form of the decoder's matrices; raises ValueError for flags that the checks refuse."""
        return WeightFormat(
            bits=self.weight_bits if self.weight_quant else None,
            group_size=self.weight_group_size,
            stochastic_rounding=self.stochastic_round or not self.weight_quant,
            simulate=self.simulation,
            int8_products=self.int8_products,
            fp8_products=self.fp8_products,
            # A command line without fp8_products is refused with a sentence; until then it has a format.
            fp8_weight_gradients=self.fp8_weight_gradients and self.fp8_products,
        )


@dataclass(frozen=True)
class SubspaceArgs(SubspaceConfig):
    """The subspace onto which gradients are projected, and its refreshes (galore and q_galore optimizers)."""

    # The defaults of the official command line; those of the library are those of q-galore-torch.
    rank: Annotated[int | str, Flag("dimensions", parse=_ranks, words=(FULL, AUTO))] = 128
    """Dimensions of the subspace of each decoder matrix; full: the whole space, with no projection. Several, such as
    128,256,512, are for as many equal parts of the layers, the first layers first. auto: one for the attention and one
    for the MLP that together take the bytes of the default rank, auto:256 of rank 256, as many for each matrix."""
    galore_scale: float = 1.0
    update_proj_gap: int = 50
    momentum_rank: Annotated[
        float, Flag("dimensions_or_share", at_least=0, parse=_dimensions_or_share, auto="stored as a whole")
    ] = 0.0
    proj_quant: Annotated[bool, Flag(auto=_BY_NAME)] = False
    mlp_rank: Annotated[int | str, Flag("dimensions", parse=_mlp_ranks, words=(FULL,), auto="rank")] = 0
    """--rank of the MLP's matrices alone: a number, several by depth, or full, where those have no projection."""

    def __post_init__(self) -> None:
        """Skip the checks of the base class: `config.checks` reports all problems of a command line together."""

    @property
    def projects(self) -> bool:
        """Whether any gradient is projected."""
        return any(rank not in (0, FULL) for rank in (*self.ranks(), *self.ranks(of_mlp=True)))

    def ranks(self, of_mlp: bool = False) -> tuple[int | str, ...]:
        """The rank of each part of the layers, the first layers first; of_mlp: of the MLP's matrices."""
        value = (of_mlp and self.mlp_rank) or self.rank
        if not isinstance(value, str):
            return (value,)
        return tuple(int(rank) if rank.isdecimal() else rank for rank in value.split(","))

    @property
    def both_ranks(self) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
        """`ranks` of --rank and of --mlp_rank, the latter empty where it is left out."""
        return self.ranks(), self.ranks(of_mlp=True) if self.mlp_rank else ()

    def by_depth(self, layers: int) -> list[SubspaceArgs]:
        """The options of each of so many layers, with one rank each."""
        attention, mlp = self.ranks(), self.ranks(of_mlp=True)
        return [
            dataclasses.replace(
                self,
                rank=attention[layer * len(attention) // layers],
                mlp_rank=mlp[layer * len(mlp) // layers] if self.mlp_rank else 0,
            )
            for layer in range(layers)
        ]

    def problems(self, label: Callable[[str], str]) -> list[str]:
        """See `SubspaceConfig`; what has no meaning where nothing is projected is seen where it is given."""
        if not self.projects:
            return self.full_rank_problems(label)
        projecting = "mlp_rank" if set(self.ranks()) == {FULL} else "rank"
        with_rank = dataclasses.replace(self, rank=1)
        return SubspaceConfig.problems(with_rank, lambda name: label(projecting if name == "rank" else name))

    def config(self, of_mlp: bool = False) -> SubspaceConfig:
        """Convert the flags to the library's options; of_mlp: for the MLP's matrices.

        Of ranks by depth, see `by_depth`, the largest counts.
        """
        ranks = self.ranks(of_mlp)
        options = vars(self) | {"rank": FULL if FULL in ranks else max(ranks)}
        if options["rank"] == FULL:
            options |= {name: default_of(SubspaceConfig, name) for name in OF_PROJECTIONS}
        return subspace_of(options)


@dataclass(frozen=True)
class ScheduleArgs:
    """The length of the run and its learning rate schedule."""

    num_training_steps: Annotated[int, Flag("updates", at_least=1)] = 10_000
    """Updates of the run."""
    max_train_tokens: Annotated[int, Flag("tokens", at_least=1, parse=parse_count, auto="none")] = 0
    """Tokens of the run, such as 100M or 1.1B; rounded up to whole updates, replaces num_training_steps."""
    scheduler: Annotated[str, Flag(choices=("cosine", "linear", "cosine_restarts", "constant", "wsd"))] = "cosine"
    """Shape of the decay from the peak to min_lr_ratio. constant stays at the peak; wsd (warm-up, stable, decay) stays
    there until the last decay_steps updates. With these two a run that is stopped at its peak can go on with a larger
    num_training_steps as if it had been planned so."""
    warmup_steps: Annotated[int, Flag("updates", at_least=0)] = 1_000
    """Updates in which the learning rate grows from 0 to its peak."""
    min_lr_ratio: Annotated[float, Flag("ratio", at_least=0, at_most=1)] = 0.1
    """Final learning rate, as a share of the peak."""
    decay_steps: Annotated[float, Flag("updates_or_share", above=0, parse=_updates_or_share)] = 0.1
    """The last updates of wsd, in which the learning rate falls: their number, or their share of num_training_steps
    such as 0.1."""
    decay_shape: Annotated[str, Flag(choices=("1-sqrt", "linear", "exponential"))] = "1-sqrt"
    """Shape of wsd's decay from the peak to min_lr_ratio."""
    restart_cycles: Annotated[int, Flag("cycles", at_least=1)] = 4
    """Equal cycles after the warm-up for cosine_restarts; each starts again at the peak."""
    average_last: Annotated[float, Flag("ratio", at_least=0, at_most=1, auto="off")] = 0.0
    """Share of the updates, the last ones, over which the weights are averaged, such as 0.1. The last weights are
    trained and saved as without; the mean is evaluated beside them after the last update (eval_averaged/perplexity,
    and eval_averaged_quantized/perplexity of what is rounded back to the format of quantized weights), is part of
    each checkpoint, and is exported by qgalore export --averaged. It is of at most 64 updates and takes 4 bytes
    a value of the main rank's host memory, and as many as the weights."""

    @property
    def averaged_updates(self) -> int:
        """How many updates `average_last` is."""
        return round(self.average_last * self.num_training_steps)

    @property
    def can_be_extended(self) -> bool:
        """Whether the learning rates before the decay, if there is one, do not depend on the length of the run."""
        return self.scheduler in ("constant", "wsd")

    @property
    def decay_updates(self) -> int:
        """How many updates `decay_steps` is."""
        steps = self.decay_steps
        return int(steps) if steps >= 1 else round(steps * self.num_training_steps)

    @property
    def decay_start(self) -> int:
        """The number of updates after which the learning rate of wsd begins to fall."""
        return self.num_training_steps - self.decay_updates


@dataclass(frozen=True)
class EvaluationArgs:
    """Validation, always on the same tokens in the same order."""

    eval_every: Annotated[int, Flag("updates", at_least=0)] = 5_000
    """Interval between two evaluations; the last update is always evaluated, 0 means then only."""
    eval_tokens: Annotated[int, Flag("tokens", at_least=1, parse=parse_count)] = 10_000_000
    """Tokens of an evaluation, such as 500K or 10M, or the whole set if that is smaller."""
    eval_batch_size: Annotated[int, Flag("sequences", at_least=1, auto="batch_size")] = 0
    """Sequences in a batch of an evaluation."""


@dataclass(frozen=True)
class CheckpointArgs:
    """Checkpoints on disk."""

    save_dir: Annotated[str, Flag("folder", auto="checkpoints/<model>-<optimizer>-<time>")] = ""
    """Folder of the run: checkpoints, metrics.jsonl, wandb."""
    save_every: Annotated[int, Flag("updates", at_least=0)] = 10_000
    """Interval between two checkpoints, the first of them before the first update; 0: none of these."""
    save_last: bool = True
    """Save after the last update. Where a signal stops it a run is saved in any case."""
    keep_checkpoints: Annotated[int, Flag("checkpoints", at_least=0)] = 3
    """Number of the newest checkpoints to keep; 0 keeps all."""
    continue_from: Annotated[str, Flag("folder")] = ""
    """Checkpoint to resume from, or auto for the newest valid one in save_dir (a fresh start if there is none)."""


@dataclass(frozen=True)
class LoggingArgs:
    """Metrics. metrics.jsonl in save_dir is always written; wandb and TensorBoard mirror it."""

    project: Annotated[str, Flag("text")] = "test"
    """Project of wandb."""
    name: Annotated[str, Flag("text")] = "test"
    """Name of the run in wandb."""
    tags: Annotated[str, Flag("text")] = ""
    """Tags of the run in wandb, separated by commas."""
    unset_wandb: bool = False
    """Turn wandb off (the same as wandb_mode off)."""
    wandb_mode: Annotated[str, Flag(choices=("auto", "online", "offline", "off"))] = "auto"
    """auto: the variable WANDB_MODE, else online with a login, offline without one."""
    tensorboard: bool = False
    """Write the metrics to event files in save_dir/tensorboard, too; needs the package tensorboard."""
    log_every: Annotated[int, Flag("updates", at_least=1)] = 1
    """Interval between two lines of metrics."""

    @property
    def resolved_wandb_mode(self) -> str:
        """`wandb_mode`, or "off" with `unset_wandb`."""
        return "off" if self.unset_wandb else self.wandb_mode

    @property
    def tag_list(self) -> list[str]:
        """The tags as a list."""
        return [tag.strip() for tag in self.tags.split(",") if tag.strip()]


@dataclass(frozen=True)
class RuntimeArgs:
    """The device, and checks while the run goes on."""

    device: Annotated[str, Flag(choices=("auto", "cpu", "cuda"), parse=_device)] = "auto"
    """auto: a CUDA GPU if there is one."""
    seed: Annotated[int, Flag("number", at_least=0)] = 0
    """Seed of the initial weights, the order of the data and stochastic rounding."""
    single_gpu: bool = False
    """Run without data parallelism, as one process."""
    shard: Annotated[str, Flag(choices=("none", "optimizer", "full"))] = "none"
    """What each of several ranks holds for all. none: every rank has all, and makes all updates. optimizer: every rank
    has the weights; each matrix has one rank that keeps its optimizer state and updates it for the others, which
    receive the stored weight. full: the weight, too, is with that rank, and a layer's are gathered before it runs.
    Ranks of one machine share; other machines have the same again."""
    shard_sums: Annotated[str, Flag(choices=("auto", "rank", "owner"))] = "auto"
    """Who sums the gradients of a dealt matrix over the micro-batches of an update. rank: every rank its own, which are
    sent once an update and take as much memory as without --shard. owner: each micro-batch's are sent to the owner,
    which alone has a sum. auto: owner with --shard full or --sum_in_momentum, else rank."""
    offload: Annotated[str, Flag(choices=("none", "states", "weights"))] = "none"
    """What of the decoder's layers waits in host memory, and is copied to the device for each layer before it is
    needed there, while another one runs. states: optimizer states and bases of subspaces, which an update of the layer
    needs. weights: the stored weights as well, which its forward and backward pass need."""
    memory_budget: Annotated[int, Flag("size", at_least=1, parse=parse_size, auto="none")] = 0
    """Memory that a rank may take on its device, such as 24GB or 22.5GiB. Of these flags those that are not given are
    chosen, so that the planned peak stays below it and the counted time of an update is least: batch_size (with a
    total_batch_size), recompute or activation_checkpointing, and int8_activations; where nothing else fits,
    grad_accum_dtype int8 or accumulate_by layer, over ranks shard, offload, a momentum in parts (momentum_rank), the
    recipe orthogonal, and at last a smaller rank. --dry_run prints the choice."""
    max_skipped_updates: Annotated[int, Flag("updates", at_least=0)] = 10
    """Consecutive updates that may be skipped because the loss or gradient is not finite, before the run stops."""
    check_replicas: Annotated[int, Flag("updates", at_least=0)] = 0
    """Interval between two comparisons of the ranks' weights by hash; 0: never."""
    dry_run: bool = False
    """Print the resolved configuration, the model's size and the planned memory, and stop."""
    nproc: Annotated[int, Flag("ranks", at_least=1, auto="those that torchrun starts")] = 0
    """With --dry_run: the ranks of the run that is described."""
