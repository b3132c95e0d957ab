"""Signatures of calls: what they tell apart, and that recognised calls get the same ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_fx.runtime import signature as module
from moeca_fx.runtime.signature import Signatures, signature_of


def call(batch: int = 2, **kwargs: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    return (torch.randn(batch, 3, 4, 4), torch.rand(batch)), kwargs


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls whose inputs were walked through."""
    seen: list[Any] = []
    own = module.signature_of

    def record(args: Any, kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return own(args, kwargs)

    monkeypatch.setattr(module, "signature_of", record)
    return seen


def test_a_call_like_an_earlier_one_is_recognised(walked: list[Any]) -> None:
    known = Signatures()
    first = known.of(*call(y=3))
    args, kwargs = call(y=3)
    signature, leaves, batch = known.of(args, kwargs)
    assert len(walked) == 1
    assert signature is first[0] and batch == 2
    assert leaves[0] is args[0] and leaves[1] is args[1] and leaves[2] == 3


@pytest.mark.parametrize(
    "other",
    [call(3), call(y=4), call(y=3.0), call(y=True), call(label=3), call(y=torch.ones(2)), call(y=None)],
    ids=["batch", "number", "type", "bool", "name", "tensor", "none"],
)
def test_other_calls_are_not_taken_for_it(other: Any) -> None:
    known = Signatures()
    first = known.of(*call(y=3))
    found, expected = known.of(*other), signature_of(*other)
    assert found[0] == expected[0] and found[2] == expected[2]
    assert found[0] != first[0]


def test_batches_share_a_signature() -> None:
    known = Signatures()
    (two, _, second), (five, _, fifth) = known.of(*call(2)), known.of(*call(5))
    assert two == five and hash(two) == hash(five) and (second, fifth) == (2, 5)


def test_positions_and_names_are_told_apart() -> None:
    x, t = torch.randn(2, 3), torch.rand(2)
    known = Signatures()
    assert known.of((x, t), {})[0] != known.of((x,), {"t": t})[0]


def test_autocast_is_part_of_it() -> None:
    known = Signatures()
    plain = known.of(*call())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert known.of(*call())[0] != plain


def test_nested_inputs_are_walked_through(walked: list[Any]) -> None:
    known = Signatures()
    for _ in range(2):
        x = torch.randn(2, 3)
        _, leaves, _ = known.of((x, [torch.ones(2), {"a": torch.zeros(2)}]), {})
        assert len(leaves) == 3
    assert len(walked) == 2


def test_a_number_that_always_changes_is_not_kept_for_ever() -> None:
    known = Signatures()
    for number in range(3 * module._MANY):
        known.of(*call(y=number))
    assert len(known._known) <= module._MANY


def test_a_hash_is_that_of_the_tuple() -> None:
    signature = signature_of(*call())[0]
    assert hash(signature) == hash(tuple(signature)) == hash(signature)
    assert tuple(signature) in {signature: 1}
