"""Benchmarks of speed: `python -m bench.cpu` and `python bench/gpu.py`."""
