"""Which split a file belongs to, by the names that people and `datasets` give files and folders.

A word such as train, validation, dev or test counts where it stands alone: no letter is before or after it. So
pretrain-validation-0.json.gz and validation(1).json.gz are validation files. The file's own name goes before
the folders that it lies in, the nearest first.
"""

import re
from pathlib import PurePosixPath

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ALONE = r"(?<![^\W\d_]){}(?![^\W\d_])"


def has_word(name: str, word: str) -> bool:
    """Whether a word stands alone in the name of a file or folder; upper and lower case are one."""
    return re.search(_ALONE.format(re.escape(word.lower())), name.lower()) is not None


def splits_named(path: str) -> set[str]:
    """The splits that a path (relative to the data set) names: the first part that names any, from the file up."""
    for part in reversed(PurePosixPath(path).parts):
        if found := {split for split, words in WORDS.items() if any(has_word(part, word) for word in words)}:
            return found
    return set()


def named(path: str, name: str) -> bool:
    """Whether a path belongs to the split that a person calls `name`: train, dev, or a word of their own."""
    words = WORDS.get(name, (name,))
    own = {split for split, known in WORDS.items() if name in known}
    if own and not own & splits_named(path):
        return False
    return any(has_word(part, word) for part in PurePosixPath(path).parts for word in words)
