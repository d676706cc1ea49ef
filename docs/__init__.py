"""The documents of the project; `docs.make` makes those that are generated."""
