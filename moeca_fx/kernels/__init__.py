"""Hand-written kernels that replace reference ops where they are faster; each is tested against the reference."""
