"""The command line: flags, checks, recipes, and the resolved arguments of a run."""
