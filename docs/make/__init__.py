"""Makes the documents that are generated: `python -m docs.make` writes them, a test says when one is stale."""
