"""What turns text into token ids: encoders, the tokenizer around them, where it is read from, how one is trained."""
