"""Find the config.json that `--model_config` names: a file, a folder, a run, a size such as 60m, or one on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.models.config_files import shipped_config
from peft_pretraining.models.hub_files import hub_file, is_hub_name

CONFIG = "config.json"
STATE = "state.json"
"""Of a checkpoint of ours, which has the contents of the model's configuration under `IN_STATE`."""
IN_STATE = "model_config_contents"
_MANIFEST = "manifest.json"
_STEP = re.compile(r"(\.replaced_)?step_\d{8,}")


def config_path(name: str | Path, flag: str = "--model_config") -> Path:
    """The file that has the configuration: a config.json, or the state.json of a checkpoint of ours.

    A path comes first, then a shipped size, then the hub. A name that is none of these is given back as a path, which
    is not there. Raises UserError that names `flag`.
    """
    path = Path(name)
    if path.is_dir() and str(name):
        try:
            found = config_in(path)
        except OSError as error:
            raise UserError(f"{flag} {name}: cannot be read ({error.strerror}); give a readable folder.") from None
        if found is None:
            raise UserError(
                f"{flag} {name}: a folder without {CONFIG}, and no checkpoint of run_pretrain.py is in it; give the "
                f"folder of a model, a run, or a JSON file."
            )
        return found
    if path.is_file():
        return path
    shipped = shipped_config(str(name))
    if shipped is not None:
        return shipped
    if is_hub_name(str(name)):
        found = hub_file(str(name), CONFIG, flag)
        if found is None:
            raise UserError(
                f"{flag} {name}: there is no such file or folder, and {CONFIG} of that model could not be found on the "
                "hub or in its cache; check the name (ORGANISATION/NAME) and the network."
            )
        return found
    return path


def config_in(folder: Path) -> Path | None:
    """The file in a folder of a model, of a run or of a checkpoint that has the configuration; None without one."""
    return next((path for path in (*states_in(folder), folder / CONFIG) if path.is_file()), None)


def states_in(folder: Path) -> list[Path]:
    """Where a folder's state.json is if it is a checkpoint of ours, or those of a run, of the newest first."""
    steps = [each for each in folder.iterdir() if _STEP.fullmatch(each.name)]
    steps.sort(key=lambda step: int(step.name.rpartition("_")[2]), reverse=True)
    return [step / STATE for step in (folder, *steps) if (step / _MANIFEST).is_file()]


def model_name(model_config: str) -> str:
    """What a model is called for whom `--model_config` names it, such as llama_60m: a part of a run's default name."""
    path = shipped_config(model_config) or Path(model_config)
    if path.name == CONFIG or _STEP.fullmatch(path.name):
        path = path.resolve().parent
    return path.name.removesuffix(".json") or "model"
