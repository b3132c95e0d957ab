"""Tests of moeca_fx: kernels."""
