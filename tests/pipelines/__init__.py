"""Pipelines of diffusers, made faster and given back."""
