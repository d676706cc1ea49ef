"""Download single files of a model from the Hugging Face hub, with a sentence where that fails."""

from __future__ import annotations

import re
from pathlib import Path

from peft_pretraining.errors import UserError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_found: dict[tuple[str, ...], Path | None] = {}


def is_hub_name(name: str) -> bool:
    """Whether it can be a model's name on the hub, ORGANISATION/NAME, and no path of that name is there."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".json") and not Path(name).exists()


def hub_file(name: str, file: str, flag: str, revision: str = "") -> Path | None:
    """The path in the hub's cache of a file of the model `name`, which is downloaded if it is not there.

    revision: a commit; "" for the newest. None where the model has no such file, or where the hub cannot be reached and
    the cache has not got it. Raises UserError that names `flag` for a model that cannot be read.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    key = (constants.ENDPOINT, constants.HF_HUB_CACHE, name, file, revision)
    if key in _found:
        return _found[key]
    try:
        _found[key] = Path(hf_hub_download(name, file, revision=revision or None))
    except LocalEntryNotFoundError:  # out of reach, and may be there the next time
        return None
    except EntryNotFoundError:
        _found[key] = None
    except GatedRepoError as error:
        raise UserError(
            f"{flag} {name}: it is gated on the hub. Accept its terms on its page there, and log in with hf auth login "
            "or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{flag} {name}: there is no such file or folder, and the hub ({constants.ENDPOINT}) has no model of this "
            "name that you may read. Check the path, or the name (ORGANISATION/NAME); for a private model, log in with "
            "hf auth login."
        ) from error
    except Exception as error:  # no network, a server's fault, a full disk: all mean the same to the user
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag} {name}: there is no such file or folder, and {file} could not be fetched from the hub ({reason}). "
            "Check the path, or the name and the network."
        ) from error
    return _found[key]


def commit_of(path: Path, file: str) -> str:
    """The commit of a path that `hub_file` gave for `file`: the cache has a folder for each."""
    return path.parents[file.count("/")].name
