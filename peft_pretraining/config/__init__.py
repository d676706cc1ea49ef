"""The command line: flags, checks, recipes, and the resolved values of a run."""
