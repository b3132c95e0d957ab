"""Graph machinery that passes share: site records, slicing, token axes, row programs, the rewrite engine."""
