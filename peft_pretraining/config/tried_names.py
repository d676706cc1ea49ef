"""Flags that people know from other trainers, and what is right here.

The names are those of transformers' `TrainingArguments`, of its example scripts, and of common pretraining scripts.
"""

import re
from collections.abc import Collection

_OTHER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing checkpoint_activations",
    "recompute": "selective_checkpointing selective_activation_checkpointing recompute_activations",
    "adam_eps": "adam_epsilon eps epsilon",
    "batch_size": "per_device_train_batch_size per_device_batch_size micro_batch_size micro_batch device_batch_size "
    "train_batch_size bs batch",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "continue_from": "resume_from_checkpoint resume_from load_checkpoint checkpoint ckpt ckpt_path",
    "dataset": "dataset_name dataset_path data data_path data_dir train_file train_data",
    "dataset_config": "dataset_config_name",
    "dtype": "torch_dtype",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_every": "eval_steps eval_interval eval_freq val_every val_interval",
    "grad_clipping": "max_grad_norm clip_grad grad_clip clip gradient_clipping gradient_clip_val",
    "gradient_accumulation": "gradient_accumulation_steps grad_accum_steps grad_accum accumulate_grad_batches",
    "keep_checkpoints": "save_total_limit",
    "log_every": "logging_steps log_interval log_steps",
    "lr": "learning_rate max_lr peak_lr",
    "max_length": "seq_len seq_length sequence_length max_seq_len max_seq_length block_size context_length n_ctx",
    "max_train_tokens": "max_tokens train_tokens num_tokens num_train_tokens tokens total_tokens",
    "min_lr_ratio": "min_lr_rate final_lr_ratio",
    "model_config": "model config config_name model_name model_path model_name_or_path",
    "init_from": "pretrained pretrained_model pretrained_model_name_or_path init_weights",
    "name": "run_name wandb_name exp_name experiment_name",
    "num_training_steps": "steps max_steps num_steps train_steps num_train_steps max_train_steps total_steps iters "
    "max_iters num_iterations train_iters updates num_updates",
    "optimizer": "optim opt",
    "project": "wandb_project project_name",
    "rank": "lora_r galore_rank lora_rank",
    "save_dir": "output_dir out_dir output outdir checkpoint_dir ckpt_dir save_path",
    "save_every": "save_steps save_interval save_freq checkpoint_interval",
    "scheduler": "lr_scheduler_type lr_scheduler lr_schedule",
    "seed": "random_seed data_seed",
    "single_gpu": "no_ddp",
    "tags": "wandb_tags",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "total_batch_size": "global_batch_size effective_batch_size",
    "unset_wandb": "no_wandb disable_wandb",
    "update_proj_gap": "galore_update_interval",
    "warmup_steps": "num_warmup_steps warmup_iters warmup_updates lr_warmup_steps",
    "weight_decay": "wd",
    "workers": "num_workers dataloader_num_workers",
}
RENAMED = {tried: right for right, names in _OTHER_NAMES.items() for tried in names.split()}
"""The flag of this program by a name of the same thing elsewhere; its value has the same meaning."""

_EPOCHS = (
    "a run is as long as --num_training_steps (updates) or --max_train_tokens says, and a data set that ends before "
    "begins again; with --repeat none the run ends with its data, after one epoch"
)
_WARMUP = "give --warmup_steps, in updates: the share times --num_training_steps"
_RESUME = "give --continue_from auto with the --save_dir of the run, or --continue_from with the folder of a checkpoint"
_BFLOAT16 = "bfloat16 is what --dtype is without being given: leave it out"
_RANKS = "torchrun --nproc_per_node starts a process for each GPU, which the program then uses all"
_DTYPES = "give --dtype, which is bfloat16 without being given; nothing is cast on the way, as in mixed precision"
_LOGS = "metrics.jsonl is always written; --tensorboard writes event files beside it, and --wandb_mode is for wandb"
_TARGET_MODULES = "all of the decoder's matrices are projected; --rank and --mlp_rank say onto how many dimensions"
ADVICE = {
    "epochs": _EPOCHS,
    "num_epochs": _EPOCHS,
    "max_epochs": _EPOCHS,
    "num_train_epochs": _EPOCHS,
    "warmup_ratio": _WARMUP,
    "warmup_fraction": _WARMUP,
    "warmup_tokens": "give --warmup_steps, in updates: the tokens divided by those of an update",
    "min_lr": "give --min_lr_ratio, the last rate as a share of --lr",
    "resume": _RESUME,
    "auto_resume": _RESUME,
    "bf16": _BFLOAT16,
    "bfloat16": _BFLOAT16,
    "amp": _DTYPES,
    "precision": _DTYPES,
    "mixed_precision": _DTYPES,
    "fp32": "write --dtype float32",
    "float32": "write --dtype float32",
    "tf32": "--dtype is the data type of weights and activations, bfloat16 or float32: leave it out",
    "gpus": _RANKS,
    "num_gpus": _RANKS,
    "nproc_per_node": _RANKS,
    "devices": _RANKS,
    "cpu": "write --device cpu",
    "gpu": "a GPU is used if there is one, or write --device cuda",
    "cuda": "a GPU is used if there is one, or write --device cuda",
    "torch_compile": "write --compile on; it is on already on a GPU with Triton",
    "do_train": "the program always trains: leave it out",
    "do_eval": "the last update is always evaluated, and --eval_every says how often else",
    "report_to": _LOGS,
    "log_to": _LOGS,
    "logger": _LOGS,
    "log_with": _LOGS,
    "wandb": "wandb records by itself where it is installed, as --wandb_mode says: leave it out",
    "streaming": "data sets on the hub are read as they are needed: leave it out",
    "target_modules": _TARGET_MODULES,
    "optim_target_modules": _TARGET_MODULES,
}
"""What is right, in a sentence, by a name for which no flag stands alone."""


_OPTIMIZERS = {
    "adam8bit": "adamw8bit adamwbnb8bit pagedadamw8bit adambnb8bit",
    "adamw": "adamwtorch adamwhf adamwtorchfused adamwfused",
    "galore_adamw": "galore",
    "galore_adamw8bit": "galore8bit",
    "galore_adamw8bit_per_layer": "galoreadamwlayerwise galoreadamw8bitlayerwise galoreperlayer",
    "q_galore_adamw8bit": "qgalore qgaloreadamw qgaloreadamw8bit qgalore8bit",
    "q_galore_adamw8bit_per_layer": "qgalore qgaloreadamw qgaloreperlayer qgalorelayerwise qgaloreadamwperlayer "
    "qgaloreadamw8bitperlayer qgaloreadamw8bitlayerwise",
}
"""Names of optimizers elsewhere, without what parts their words, by those of --optimizer."""


def meant_values(flag: str, value: str) -> list[str]:
    """The values of a flag that a name from elsewhere stands for; none where it is not known."""
    tried = re.sub(r"[\W_]", "", value.lower())
    return [right for right, names in _OPTIMIZERS.items() if flag == "optimizer" and tried in names.split()]


def normal_form(flag: str) -> str:
    """A flag of a command line as the tables have it: --Learning-Rate=3 is learning_rate."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_").lower()


def what_is_right(flag: str, value: str, switches: Collection[str], dtypes: Collection[object]) -> str:
    """A sentence on what to write instead of a flag from elsewhere, with its value ("" if none); "" if unknown.

    switches: the flags of this program that take no value; dtypes: the values of --dtype.
    """
    tried = normal_form(flag)
    if tried in ("fp16", "float16", "half"):
        return "write --dtype float16" if "float16" in dtypes else "use bfloat16, which --dtype is without being given"
    if right := RENAMED.get(tried):
        has_value = value and right not in switches
        return f"write --{right} {value}" if has_value else f"write --{right}"
    return ADVICE.get(tried, "")


def flags_in_advice() -> set[str]:
    """The flags of this program that the tables name."""
    return set(RENAMED.values()) | {name for text in ADVICE.values() for name in re.findall(r"--(\w+)", text)}
