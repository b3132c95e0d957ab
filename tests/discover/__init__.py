"""Tests of moeca_fx: discover."""
