"""Find the split of a file by the names of the file and its folders.

A word such as train, validation, dev or test counts if no letter is before or after it. So
pretrain-validation-0.json.gz and validation(1).json.gz are validation files. The name of the file takes precedence over
those of its folders, and a nearer folder over one further up.
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
    """Whether the name of a file or folder contains `word` between non-letters, in any case."""
    return re.search(_ALONE.format(re.escape(word.lower())), name.lower()) is not None


def splits_named(path: str) -> set[str]:
    """The splits in the name of a path (relative to the data set): of its last part that names any."""
    for part in reversed(PurePosixPath(path).parts):
        if found := {split for split, words in WORDS.items() if any(has_word(part, word) for word in words)}:
            return found
    return set()


def is_in_a_title(path: str) -> bool:
    """Whether a split is named by a word among others, as in after_training.txt, not by one alone, as in train-0."""
    for part in reversed(PurePosixPath(path).parts):
        words = re.findall(r"[^\W\d_]+", part.partition(".")[0].lower())
        if splits_named(part):
            return any(word != "of" and not splits_named(word) for word in words)
    return False


def named(path: str, name: str) -> bool:
    """Whether a path belongs to the split `name` of a flag: train, dev, or any other word."""
    words = WORDS.get(name, (name,))
    own = {split for split, known in WORDS.items() if name in known}
    if own and not own & splits_named(path):
        return False
    return any(has_word(part, word) for part in PurePosixPath(path).parts for word in words)
