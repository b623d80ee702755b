"""The laboratory: a small world, a model that learned it, and what reducers leave of that."""
