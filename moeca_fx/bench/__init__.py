"""The bench: every policy on the same noise, the same sampler and in one process, with its peers beside it."""
