"""The subspace of a weight: how it is found, when it is refreshed, what is done with the rest."""
