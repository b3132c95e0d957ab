"""Hand-written kernels in the place of reference operations where they are faster, each tested against the reference."""
