"""Tokenizers: encoders, the tokenizer around them, reading one from files, and training one."""
