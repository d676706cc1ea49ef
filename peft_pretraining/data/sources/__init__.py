"""Where documents and token ids come from."""
