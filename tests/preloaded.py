"""Loads, in the process from which ranks are forked, what each of them would load and read first.

Without it a rank of a small run spends half of its time on that, most of it on the docstrings of flags.
"""

import numpy.ma  # noqa: F401 - by the first `numpy.unique`
import torch._dynamo  # noqa: F401 - by the first optimizer

import peft_pretraining.models.llama.modeling  # noqa: F401 - whose operators are defined when it is built
from peft_pretraining.config.parse import parse_args
from tests.small_run import ROOT

parse_args(["--model_config", str(ROOT / "configs/llama_9m.json"), "--dataset", "pydocs", "--batch_size", "1"])
