"""Tests of moeca_fx: models of other projects."""
