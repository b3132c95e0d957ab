"""What runs a transformed model: trajectories in named contexts, statistics, memory, FLOPs."""
