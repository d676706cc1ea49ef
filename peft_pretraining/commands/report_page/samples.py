"""Text that the newest checkpoint of a run writes after fixed prompts, with a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.reporting.page import Section, paragraph, sample

PROMPTS = ("The", "Once upon a time", "The most important thing about")
"""Beginnings that a model of any text in English can continue."""
MAX_TOKENS = 80


@dataclass(frozen=True)
class SampleOptions:
    """How samples are made."""

    wanted: bool = True
    prompts: Sequence[str] = PROMPTS
    device: str = "cpu"
    tokenizer: str = ""
    """Name or path; "": the one of the run."""
    seed: int = 0


def samples_section(folder: Path, options: SampleOptions) -> Section:
    """Text after each prompt; where it cannot be made, the reason."""
    key, title = "samples", "Samples"
    if not options.wanted:
        return Section(key, title, [paragraph("Left out, as --no_samples asks.")])
    try:
        told, texts = _continued(folder, options)
    except (UserError, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Section(key, title, [paragraph(f"No text could be generated. {reason.strip()}")])
    return Section(
        key, title, [paragraph(told), *(sample(p, text) for p, text in zip(options.prompts, texts, strict=True))]
    )


def _continued(folder: Path, options: SampleOptions) -> tuple[str, list[str]]:
    """(how the texts were made, what follows each prompt). Raises UserError."""
    from peft_pretraining.after_training.trained_model import open_trained
    from peft_pretraining.after_training.trained_tokenizer import tokenizer_of
    from peft_pretraining.commands.generate import Generator, Sampling

    trained = open_trained(folder, options.device)
    generator = Generator(trained, tokenizer_of(trained, options.tokenizer))
    # Seeds of their own, or the continuations would resemble each other.
    samplings = [Sampling(seed=options.seed + number) for number in range(len(options.prompts))]
    if problems := samplings[0].problems():
        raise UserError(f"{'; '.join(problems)}.")
    texts = [
        generator.continue_text(prompt, MAX_TOKENS, sampling)[0]
        for prompt, sampling in zip(options.prompts, samplings, strict=True)
    ]
    told = (
        f"Of {trained.describe()}, at a temperature of {samplings[0].temperature:g}, up to {MAX_TOKENS} tokens. The "
        f"prompt is bold. The first has the seed {options.seed}, each other the next one."
    )
    return told, texts
