"""What the commands after a training share: the model and the tokenizer that a run or an export has."""
