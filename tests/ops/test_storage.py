"""Vectors in fewer bits: how exact, by rows as well as whole, and in place."""

import pytest
import torch

from moeca_fx.ops import storage


def _values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    scales = torch.logspace(-6, 6, shape[-2]).unsqueeze(-1)  # vectors of very different size
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scales).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fp8_rounds_every_value_by_its_own_vector(dtype: torch.dtype) -> None:
    values = _values(2, 5, 24, dtype=dtype)
    code, scale = storage.encode_rows(values)
    assert (code.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (2, 5))
    torch.testing.assert_close(scale, values.abs().amax(-1).float() / 448)
    found = storage.decode_rows(code, scale, dtype)
    assert found.dtype == dtype
    # Three mantissa bits, and steps of 2**-9 codes next to zero.
    allowed = values.abs().double() / 16 + scale.double().unsqueeze(-1) * 2**-9
    if dtype == torch.bfloat16:
        allowed += values.abs().double() * 2**-8
    assert bool(((found - values).abs().double() <= allowed).all())
    assert not torch.equal(found, values)


def test_encoding_what_was_decoded_changes_nothing_more() -> None:
    once = storage.decode_rows(*storage.encode_rows(_values(3, 4, 16)), torch.float32)
    twice = storage.decode_rows(*storage.encode_rows(once), torch.float32)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_vectors_of_zeros_and_of_the_smallest_numbers() -> None:
    values = torch.stack([torch.zeros(4), torch.full((4,), 1e-45), torch.full((4,), 3e38)])
    code, scale = storage.encode_rows(values)
    assert scale[0] == scale[1] == 1
    found = storage.decode_rows(code, scale, torch.float32)
    assert bool(torch.isfinite(found).all()) and not found[:2].any()
    torch.testing.assert_close(found[2], values[2], rtol=1e-6, atol=0)


def test_bf16_has_no_scale() -> None:
    values = _values(2, 3, 8)
    code = storage.narrow_rows(values)
    assert code.dtype == torch.bfloat16
    torch.testing.assert_close(storage.decode_rows(code, None, torch.float32), values, rtol=2**-8, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_alone(scaled: bool) -> None:
    values, row = _values(2, 3, 2, 8), torch.tensor([11, 0, 7])
    code, scale = storage.encode_rows(values) if scaled else (storage.narrow_rows(values), None)
    whole = storage.decode_rows(code, scale, torch.float32).view(-1, 8)
    assert torch.equal(storage.read_rows(code, scale, row, torch.float32), whole[row])
    if scale is not None:
        fresh = torch.randn(3, 8)
        found = storage.decode_written(code, scale, row, fresh, torch.float32).view(-1, 8)
        others = [index for index in range(12) if index not in row]
        assert torch.equal(found[row], fresh) and torch.equal(found[others], whole[others])
    none = torch.empty(0, dtype=torch.int64)
    assert storage.read_rows(code, scale, none, torch.float32).shape == (0, 8)


def test_codes_are_written_in_place_and_as_they_are() -> None:
    cache, _ = storage.encode_rows(_values(2, 3, 8))
    fresh, _ = storage.encode_rows(torch.randn(2, 8))
    row = torch.tensor([5, 1])
    before = cache.clone()
    written = storage.write_codes(cache, row, fresh)
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))
    found = storage.write_codes_(cache, row, fresh)
    assert found.data_ptr() == cache.data_ptr()
    for each in (written, found):
        assert each.dtype == torch.float8_e4m3fn
        assert torch.equal(each.view(torch.uint8).view(-1, 8)[row], fresh.view(torch.uint8))
        assert torch.equal(
            each.view(torch.uint8).view(-1, 8)[[0, 2, 3, 4]], before.view(torch.uint8).view(-1, 8)[[0, 2, 3, 4]]
        )
