"""Load text or token ids and cut them into batches, in an order that does not depend on ranks or workers."""
