"""Hand-written kernels that replace reference operations where they are faster, each tested against its reference."""
