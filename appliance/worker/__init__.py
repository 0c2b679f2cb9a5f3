"""The worker: faces the data, has no network."""
