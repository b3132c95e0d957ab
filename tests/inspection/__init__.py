"""Tests of moeca_fx: inspection."""
