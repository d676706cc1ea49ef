"""What golden runs are made of: a tiny model, token ids, and a table of the ways to train with the flags of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

WITHOUT_GRAPHS = " without graphs"
"""Added to the name of a mode: the same on a GPU, but that every kernel is launched from Python."""

MODEL = {
    # Layers enough for every second one to be recomputed. Gradients of the MLP are large enough for 8-bit moments,
    # those of attention are not, and 133 is no multiple of 8.
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 133,
    "num_attention_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
UPDATES, UPDATES_ON_GPU = 9, 15
ALWAYS = (
    "--batch_size 4 --max_length 32 --data_lanes 4 --workers 0 --dtype float32 --lr 1e-2 --warmup_steps 2 "
    f"--num_training_steps {UPDATES} --eval_every 0 --eval_tokens 500 --save_every 0 --unset_wandb"
)
"""Before a mode's own flags; of a flag that is given twice the last counts."""

GALORE = "--rank 32 --galore_scale 0.5 --update_proj_gap 2"
LAZY = "--cos_threshold 0.55 --queue_size 1"
"""So that the lazy rule doubles some intervals and leaves others as they are."""
QUANTIZED = "--weight_quant --weight_group_size 48 --stochastic_round --proj_quant --proj_group_size 48"
PAPER = f"--optimizer q_galore_adamw8bit --recipe paper {QUANTIZED} {GALORE} {LAZY}"
PER_LAYER = f"--optimizer q_galore_adamw8bit_per_layer --recipe paper {QUANTIZED} {GALORE}"
STREAMING = f"{PER_LAYER} --subspace streaming"
ORTHOGONAL = f"{QUANTIZED} --update_proj_gap 3"

# How far the losses of a mode may lie from those recorded in another place, relative to them: about four times the
# largest distance between six places on one processor: AVX2 or ATen's plain code, one thread or two, and MKL's code for
# this processor or for any (MKL_CBWR=COMPATIBLE). Sums in another order differ in their last bits, and a loss follows
# those as far as the mode lets it.
FLOATS = 1e-6
"""Float32 throughout: 1.8e-7 was measured."""
STEADY = 1e-4
"""8-bit moments, or a Newton-Schulz iteration in bfloat16, but no noise: 2.1e-5."""
STOCHASTIC = 2e-3
"""Stochastic rounding, where a last bit decides which way a weight goes: 5.1e-4."""
COARSE = 1e-2
"""The same with larger noise, of weights of 4 bits (2.5e-3) or of sums of gradients in 8 bits (9.9e-4)."""


@dataclass(frozen=True)
class Mode:
    """A way to train."""

    flags: str
    tolerance: float = STOCHASTIC
    """For losses that were recorded in another place."""
    on_gpu: bool = False
    """Whether it is recorded there, too."""
    ranks: int = 1

    @property
    def has_graphs(self) -> bool:
        """Whether its layers run from CUDA graphs on a GPU, as those of low-rank methods do."""
        return "galore" in self.flags


MODES: dict[str, Mode] = {
    "adamw": Mode("--optimizer adamw --weight_decay 0.1", FLOATS, on_gpu=True),
    "adam8bit": Mode("--optimizer adam8bit --weight_decay 0.1 --dtype bfloat16"),
    "muon": Mode("--optimizer muon", STEADY),
    "galore": Mode(f"--optimizer galore_adamw {GALORE} {LAZY} --weight_decay 0.1", FLOATS),
    "both_sides": Mode(f"--optimizer galore_adamw {GALORE} {LAZY} --proj_type full", FLOATS),
    "clipping": Mode(f"--optimizer galore_adamw8bit {GALORE} --rotate_moments --grad_clipping 0.5", STEADY),
    "paper": Mode(PAPER, on_gpu=True),
    "per_layer": Mode(f"{PER_LAYER} {LAZY}", on_gpu=True),
    "streaming": Mode(STREAMING, on_gpu=True),
    "orthogonal": Mode(f"--optimizer q_galore_adamw8bit {ORTHOGONAL} --dtype bfloat16"),
    "orthogonal_per_layer": Mode(f"--optimizer q_galore_adamw8bit_per_layer {ORTHOGONAL}", on_gpu=True),
    "fira": Mode(f"{STREAMING} --residual fira --norm_growth 1.01"),
    "int8_sums": Mode(f"{STREAMING} --batch_size 2 --gradient_accumulation 2 --grad_accum_dtype int8", COARSE, True),
    "int8_products": Mode(f"{STREAMING} --int8_products --weight_group_size 256", on_gpu=True),
    "recomputing": Mode(f"{STREAMING} --activation_checkpointing --checkpoint_every 2 --int8_activations", on_gpu=True),
    "simulation": Mode(f"{PAPER} --simulation"),
    "int4": Mode(
        f"{PAPER} --weight_bits 4 --proj_bits 8 --proj_type reverse_std --svd_method randomized --mlp_rank 24 "
        "--batch_size 2 --gradient_accumulation 2 --grad_accum_dtype bfloat16",
        COARSE,
    ),
    "two_ranks": Mode(f"{STREAMING} --batch_size 1 --gradient_accumulation 2 --grad_accum_dtype int8", COARSE, ranks=2),
}


def names(device: str) -> list[str]:
    """Of all runs on a device: modes, and on a GPU those with graphs once more without."""
    if device == "cpu":
        return list(MODES)
    on_gpu = [(name, mode) for name, mode in MODES.items() if mode.on_gpu]
    return [each for name, mode in on_gpu for each in ([name, name + WITHOUT_GRAPHS] if mode.has_graphs else [name])]


def mode_of(name: str) -> Mode:
    """The mode of a run."""
    return MODES[name.removesuffix(WITHOUT_GRAPHS)]


def command_line(name: str, device: str, folder: Path) -> list[str]:
    """The flags of a run, whose model and data are put into `folder`; it writes into `folder`/run."""
    config = folder / "model.json"
    config.write_text(json.dumps(MODEL), encoding="utf-8")
    for split, count, seed in (("train", 12_000, 1), ("validation", 1_000, 2)):
        (folder / f"{split}.uint16").write_bytes(token_ids(count, seed))
    flags = f"{ALWAYS} {mode_of(name).flags} --device {device}".split()
    if device == "cuda":
        # Graphs are captured from the third step on, those of a layer's backward pass where it has no refresh.
        flags += ["--num_training_steps", str(UPDATES_ON_GPU), "--dtype", "bfloat16"]
        flags += ["--cuda_graphs", "off" if name.endswith(WITHOUT_GRAPHS) else "auto"]
    return [*flags, "--model_config", str(config), "--dataset", str(folder), "--save_dir", str(folder / "run")]


def token_ids(count: int, seed: int) -> bytes:
    """uint16 ids in which four tokens of equal probability follow each token, chosen by Knuth's generator."""
    state, token, ids = seed, 0, bytearray()
    for _ in range(count):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        token = (3 * token + 7 + 31 * (state >> 62)) % 256
        ids += token.to_bytes(2, "little")
    return bytes(ids)
