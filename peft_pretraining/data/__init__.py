"""Text and token ids on their way to batches, in an order that does not depend on ranks or workers."""
