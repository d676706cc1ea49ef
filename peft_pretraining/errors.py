"""The exception for what a user can fix: `run_pretrain.py` prints its text alone, without a traceback."""


class UserError(ValueError):
    """A sentence that names the flag or file, says what is wrong and what would be right."""
