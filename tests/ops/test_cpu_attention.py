"""Up to how many tokens the own attention replaces torch's, by what was measured."""

from collections.abc import Iterator

import pytest

from moeca_fx.ops import cpu_attention


@pytest.fixture(autouse=True)
def fresh_measurement() -> Iterator[None]:
    cpu_attention.own_attention_up_to.cache_clear()
    yield
    cpu_attention.own_attention_up_to.cache_clear()


@pytest.mark.parametrize(
    ("faster_at", "expected"), [([], 0), ([64], 64), ([64, 256], 256), ([64, 256, 1024], 1024), ([256, 1024], 0)]
)
def test_the_own_kernel_is_used_up_to_where_it_is_faster(
    faster_at: list[int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([64, 256, 1024])

    def shares(*runs: object) -> float:
        return 0.5 if next(counts) in faster_at else 0.95  # the latter may be noise

    monkeypatch.setattr(cpu_attention.kernels, "available", lambda: True)
    monkeypatch.setattr(cpu_attention, "share_of_time", shares)
    assert cpu_attention.own_attention_up_to() == expected
    assert cpu_attention.own_attention_up_to() == expected  # measured once


def test_without_kernels_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention.kernels, "available", lambda: False)
    monkeypatch.setattr(cpu_attention, "share_of_time", lambda *runs: pytest.fail("must not be timed"))
    assert cpu_attention.own_attention_up_to() == 0
