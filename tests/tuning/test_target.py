"""Targets: what is read, what is refused."""

import pytest

from moeca_fx.errors import ConfigError
from moeca_fx.tuning import Target, parse_target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3x", Target(speedup=3.0)),
        ("2.5X", Target(speedup=2.5)),
        ("40 dB", Target(psnr=40.0)),
        ("40dB,1.2GB", Target(psnr=40.0, cache_bytes=1.2e9)),
        ("3x, 500 MiB", Target(speedup=3.0, cache_bytes=500 * 2**20)),
    ],
)
def test_read(text: str, expected: Target) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "found 'fast'"),
        ("", "found ''"),
        ("3", "found '3'"),
        ("-3x", "found '-3x'"),
        ("1x", "above 1x"),
        ("3x,4x", "speedup is given twice"),
        ("0MB", "cache size above 0 bytes"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_target(text)


def test_a_cache_size_alone_is_taken_at_three_times_fewer_flops() -> None:
    assert parse_target("1.2GB") == Target(speedup=3.0, cache_bytes=1.2e9)
    with pytest.raises(ConfigError, match="found none"):
        Target()


def test_met() -> None:
    target = Target(speedup=3.0, psnr=40.0, cache_bytes=100)
    assert target.met(2.99, 40.0, 100) and target.met(5, 50, 0)
    assert not target.met(2.9, 50, 0) and not target.met(3, 39.9, 0) and not target.met(3, 40, 101)
    assert str(target) == "3x fewer FLOPs, at least 40 dB, at most 0.0001 MB of cache"
