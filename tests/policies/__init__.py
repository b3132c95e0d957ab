"""Tests of the caching policies."""
