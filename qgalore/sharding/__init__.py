"""Deal the weights of a model to ranks, each of which keeps the states of its own and updates them for all."""
