"""Rules of `lower_kernels`, one file a kind of computation: each lowers one call, or says why it stays as it is."""
