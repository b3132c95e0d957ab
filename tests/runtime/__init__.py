"""Tests of moeca_fx: runtime."""
