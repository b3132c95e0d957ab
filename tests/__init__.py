"""The test suite; a package so that tests can import the reference implementation by name."""
