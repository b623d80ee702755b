"""Microbenchmarks: ``python -m bench`` times every operator against its rivals."""
