"""Tests of moeca_fx: passes."""
