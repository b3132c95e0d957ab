"""Tests of moeca_fx: ops."""
