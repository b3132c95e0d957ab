"""Hand-written kernels that replace reference operations where they are faster; each is tested against the reference."""
