"""Links with plain names, for a library that takes a file's own name apart."""

import os
import tempfile
from pathlib import Path


def plain_link(place: str, folder: str) -> "tempfile.TemporaryDirectory[str]":
    """A new folder in `folder` with a link to a local file, for `link_in`; both go away with the object."""
    made = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
    Path(link_in(made)).symlink_to(os.path.realpath(place))
    return made


def link_in(made: "tempfile.TemporaryDirectory[str]") -> str:
    """The link in a folder that `plain_link` made."""
    return f"{made.name}/file"
