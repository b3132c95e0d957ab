"""Rules of `lower_kernels`, one file a family: each lowers one call, or says why it stays as it is."""
