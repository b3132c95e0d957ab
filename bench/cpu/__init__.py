"""The CPU benchmark: steps, layers, trajectories and memory, each in interleaved repeats in one process."""
