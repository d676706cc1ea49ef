"""Open data sets of every kind as sources of documents or token ids."""
