"""A device's part of the model, as the server hands it over: files that are fetched once, checked, opened and run."""
