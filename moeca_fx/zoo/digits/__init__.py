"""A small DSMoE trained on scikit-learn's 8x8 digits: real weights that a laptop can sample in seconds."""
