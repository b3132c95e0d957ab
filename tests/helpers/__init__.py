"""What several test folders share: tiny models, inputs, and the check that every pass must meet."""
