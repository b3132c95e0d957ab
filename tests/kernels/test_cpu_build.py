"""Building the CPU kernels: once a machine, and a clear word where it cannot be done."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeca_fx.kernels.cpu import build


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test loads anew; afterwards the library of this process is found again."""
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.OFF, "0")
    assert not build.load()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with caplog.at_level(logging.WARNING, "moeca_fx.kernels"):
        assert not build.load() and not build.load()
    (record,) = caplog.records
    assert "there is no C++ compiler" in record.message and "reference operations run instead" in record.message


def test_a_compiler_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "this compiler is broken" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MOECA_FX_CACHE", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING, "moeca_fx.kernels"):
        assert not build.load()
    assert "this compiler is broken" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-built is left


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOECA_FX_CACHE", str(tmp_path))
    assert build.cache_folder() == tmp_path
    monkeypatch.delenv("MOECA_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "moeca_fx"
