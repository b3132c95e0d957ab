"""Fused operations of full and cached steps on a CPU, in C++."""
