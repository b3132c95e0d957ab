"""The share of structures that transform, said at the end of a run that examined them."""

import pytest

from tests.structures.results import Results, run

_RESULTS = pytest.StashKey[Results]()


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    """The whole sample, examined once a session."""
    if _RESULTS not in pytestconfig.stash:
        pytestconfig.stash[_RESULTS] = run()
    return pytestconfig.stash[_RESULTS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _RESULTS in config.stash:
        found = config.stash[_RESULTS]
        terminalreporter.section("structures")
        terminalreporter.write_line(found.summary())
        for code, count in found.reasons.most_common():
            terminalreporter.write_line(f"  refused {count}: {code}")
        for line in found.broken:
            terminalreporter.write_line(f"  {line}")
