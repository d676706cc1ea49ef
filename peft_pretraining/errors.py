"""What a user can fix: an exception whose text `run_pretrain.py` prints alone, without a traceback."""


class UserError(ValueError):
    """A sentence that names the flag or file, says what is wrong and what would be right."""


_EXTRA_OF = (
    {"matplotlib": "plot", "peft": "baselines"}
    | dict.fromkeys(("accelerate", "scipy", "sklearn"), "finetune")
    | dict.fromkeys(
        (
            "bitsandbytes", "datasets", "huggingface_hub", "numpy", "safetensors", "sentencepiece", "tokenizers",
            "tqdm", "transformers", "wandb", "zstandard",
        ),
        "train",
    )
)  # fmt: skip
"""The extra of pyproject.toml that installs a package."""


def missing_package(error: ModuleNotFoundError) -> str | None:
    """A sentence on the extra that installs the missing package; None if no extra does."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(package)
    return extra and f"needs the package {package}, which is not installed: pip install 'qgalore[{extra}]'"
