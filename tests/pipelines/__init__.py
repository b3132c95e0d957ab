"""Pipelines of diffusers, made faster and given back."""

import pytest

pytest.importorskip("diffusers", reason="the package diffusers is not installed (extra: pipelines)")
