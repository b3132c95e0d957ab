"""A DSMoE with 48 experts and 256 tokens, trained on letters and digits that this project renders itself."""
