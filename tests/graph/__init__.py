"""Tests of moeca_fx: graph."""
