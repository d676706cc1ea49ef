"""The command lines of the commands beside `pretrain`, which answer a flag that they do not have with the right one."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Iterator, Sequence

from peft_pretraining.config.tried_names import RENAMED, normal_form

_OTHER_NAMES = {
    "averaged": "average ema use_ema",
    "by": "x_axis xaxis x",
    "eval_batch_size": "batch_size micro_batch_size bs batch",
    "eval_tokens": "max_eval_tokens num_eval_tokens max_tokens tokens limit",
    "log": "log_y logy yscale",
    "log_x": "logx xscale",
    "max_tokens": "max_new_tokens max_length length num_tokens n_tokens tokens new_tokens",
    "metric": "metrics y_axis yaxis y",
    "no_samples": "no_text without_samples",
    "output": "out out_file outfile output_file output_path",
    "output_dir": "out out_dir outdir output save_dir",
    "prompt": "text input",
    "smooth": "smoothing window running_mean",
    "temperature": "temp",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
}
"""Names of other programs by the flag of one of ours; of each command those count whose flag it has."""
_OF_POSITIONALS = {
    "run": "run run_dir save_dir model model_path model_name_or_path model_config checkpoint checkpoint_path ckpt path "
    "continue_from init_from",
    "runs": "run runs run_dir save_dir checkpoint path",
    "checkpoint": "checkpoint checkpoint_path ckpt run run_dir save_dir model model_path path continue_from",
    "output": "output output_dir out out_dir outdir save_path save_dir",
    "prompt": "prompt prompts text input",
}
"""Names of what stands without a flag, by its name."""


class CommandParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with advice for flags that it does not know."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As of the base class."""
        self._refuse_unknown(args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As of the base class."""
        self._refuse_unknown(args)
        return super().parse_intermixed_args(args, namespace)

    def _refuse_unknown(self, args: Sequence[str] | None) -> None:
        """Leave the program with a sentence for each unknown flag, also where something else is missing."""
        texts = list(self._corrections(sys.argv[1:] if args is None else args))
        if texts:
            self.error("; ".join(texts))

    def _corrections(self, argv: Sequence[str]) -> Iterator[str]:
        known = [name for action in self._actions for name in action.option_strings]
        if {"-h", "--help"} & {*argv}:
            return
        for token, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if token == "--":
                return
            name, equals, value = token.partition("=")
            is_known = name in known or (self.allow_abbrev and any(each.startswith(name) for each in known))
            if name.startswith("--") and not is_known:
                value = value if equals else "" if following.startswith("-") else following
                yield f"{name} is no flag of {self.prog}: {self._advice(name, value)}"

    def _advice(self, name: str, value: str) -> str:
        flags = {name.removeprefix("--"): action for action in self._actions for name in action.option_strings}
        positionals = [action for action in self._actions if not action.option_strings]
        tried = normal_form(name)
        rights = [right for right, names in _OTHER_NAMES.items() if tried in names.split()]
        right = next((each for each in (tried, *rights, RENAMED.get(tried, "")) if each in flags), "")
        if right:
            return f"write --{right} {value}".rstrip() if flags[right].nargs != 0 else f"write --{right}"
        names = [each.metavar if isinstance(each.metavar, str) else each.dest.upper() for each in positionals]
        for index, positional in enumerate(positionals):
            if tried in _OF_POSITIONALS.get(positional.dest, "").split():
                example = " ".join([*names[:index], value or names[index]])
                return f"{names[index]} stands without a flag, as in {self.prog} {example}"
        nearest = difflib.get_close_matches(tried, flags, n=1, cutoff=0.6)
        return f"did you mean --{nearest[0]}?" if nearest else "--help lists them all"
