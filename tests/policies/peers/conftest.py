"""Every method meets its reference on DSMoE in the fast suite; the DiT-MoE families are left to `make slow`."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")  # type: ignore[attr-defined]
        compares = "test_reference" not in item.nodeid
        if compares and "policies/peers" in item.nodeid and str(family).startswith("ditmoe"):
            item.add_marker(pytest.mark.slow)
