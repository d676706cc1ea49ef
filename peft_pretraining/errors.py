"""The one exception for what a user can put right: its text is all that `run_pretrain.py` prints."""


class UserError(ValueError):
    """A sentence that names the flag or file, says what is wrong and what would be right."""
