"""Use in other people's stacks: each module needs its package, and uses the public functions."""
