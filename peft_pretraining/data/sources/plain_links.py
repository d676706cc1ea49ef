"""Links with plain names, for a library that parses :: in a file's name."""

import os
import tempfile
from pathlib import Path


def plain_link(path: str, folder: str) -> "tempfile.TemporaryDirectory[str]":
    """Create a folder in `folder` with a link to a local file, for `link_in`; both are deleted with the object."""
    made = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
    Path(link_in(made)).symlink_to(os.path.realpath(path))
    return made


def link_in(made: "tempfile.TemporaryDirectory[str]") -> str:
    """The path of the link in a folder of `plain_link`."""
    return f"{made.name}/file"
