"""Routings read from values alone: each equals the weights that a loop over its branches gives."""

import torch
from torch import Tensor

from moeca_fx.discover.inline.branches import branches_of
from moeca_fx.discover.inline.routings import Routing, find_routings
from moeca_fx.discover.inline.tape import Tape
from moeca_fx.discover.reference import choice_as_tokens

SAMPLES, TOKENS, EXPERTS = 2, 5, 4
ROWS = SAMPLES * TOKENS


def _found(dropped: bool = False, **values: Tensor) -> dict[Routing, Tensor]:
    tape = Tape(values=dict(enumerate(values.values())))
    shares = find_routings(tape, tape.values, EXPERTS, ROWS, SAMPLES, torch.arange(ROWS), dropped)
    return dict(zip(shares.routings, shares.weights, strict=True))


def _as_shares(routing: Routing, values: list[Tensor]) -> Tensor:
    """[N, E] from the branches that the marker would get."""
    x = torch.zeros(ROWS, 3)
    branches = branches_of(routing, x, values, (), EXPERTS)
    ids, weight = branches.chosen, branches.weight
    if routing.kind == "choice":
        ids, weight = choice_as_tokens(x, ids, weight)
    shares = torch.zeros(ROWS, EXPERTS + 1)
    for row in range(ROWS):
        for expert, share in zip(ids.reshape(ROWS, -1)[row], weight.reshape(ROWS, -1)[row], strict=True):
            shares[row, int(expert)] += share
    return shares[:, :EXPERTS]


def _ids(k: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    weight, ids = torch.rand(ROWS, EXPERTS).topk(k)
    return ids, weight


def test_ids_and_weights() -> None:
    ids, weight = _ids()
    (found,) = _found(ids=ids.view(SAMPLES, TOKENS, 2), weight=weight.flatten()).items()
    routing, shares = found
    assert (routing.kind, routing.slots, routing.beyond) == ("ids", 2, "none")
    expected = torch.zeros(ROWS, EXPERTS).scatter(1, ids, weight)
    assert torch.equal(shares[:, :EXPERTS].float(), expected)
    assert torch.equal(_as_shares(routing, [weight, ids]), expected)


def test_ids_beyond_the_experts_are_nothing_or_the_input() -> None:
    ids, weight = _ids()
    ids = ids + (ids == 1) * 3  # expert 1 becomes id 4
    found = _found(ids=ids, weight=weight)
    assert [routing.beyond for routing in found] == ["zero", "identity"]
    beyond = torch.where(ids == EXPERTS, weight, 0).sum(1)
    nothing, identity = found.values()
    assert torch.equal(identity[:, EXPERTS].float(), beyond) and not nothing[:, EXPERTS].any()
    for routing in found:
        assert torch.equal(_as_shares(routing, [weight, ids]), nothing[:, :EXPERTS].float())
    identity_routing = list(found)[1]
    ((_, share),) = branches_of(identity_routing, torch.zeros(ROWS, 3), [weight, ids], (), EXPERTS).free
    assert torch.equal(share.squeeze(-1), beyond)


def test_branches_beyond_a_capacity() -> None:
    ids, weight = _ids()
    place = torch.arange(ROWS * 2).view(ROWS, 2) % 4
    found = _found(True, ids=ids, weight=weight, place=place)
    (routing,) = [routing for routing in found if (routing.place, routing.limit) == (2, 3)]
    expected = torch.zeros(ROWS, EXPERTS).scatter(1, ids, torch.where(place < 3, weight, 0))
    assert torch.equal(found[routing][:, :EXPERTS].float(), expected)
    assert torch.equal(_as_shares(routing, [weight, ids, place]), expected)
    assert all(routing.place is None for routing in _found(ids=ids, weight=weight, place=place))


def test_dense_weights_and_buffers() -> None:
    ids, weight = _ids()
    dense = torch.zeros(ROWS, EXPERTS).scatter(1, ids, weight)
    for values in ({"dense": dense.view(SAMPLES, TOKENS, EXPERTS)}, {"buffer": dense[..., None] * torch.eye(3)[0]}):
        (found,) = _found(**values).items()
        routing, shares = found
        assert routing.kind == "dense" and routing.slots == EXPERTS and routing.reduced == ("buffer" in values)
        assert torch.equal(shares[:, :EXPERTS].float(), dense)
        assert torch.equal(_as_shares(routing, list(values.values())), dense)


def test_tokens_chosen_by_experts() -> None:
    torch.manual_seed(2)
    weight, token = torch.rand(SAMPLES, EXPERTS, TOKENS).topk(3)
    expected = torch.zeros(SAMPLES, EXPERTS, TOKENS).scatter(-1, token, weight).transpose(1, 2).reshape(ROWS, EXPERTS)
    by_expert = weight.transpose(0, 1).reshape(-1)
    for value, expert_first in ((weight, False), (by_expert, True)):
        found = _found(token=token, weight=value)
        (routing,) = [routing for routing in found if routing.expert_first == expert_first]
        assert (routing.kind, routing.slots) == ("choice", 3)
        assert torch.equal(found[routing][:, :EXPERTS].float(), expected)
        assert torch.equal(_as_shares(routing, [value, token]), expected)


def test_values_that_are_no_routing() -> None:
    ids, weight = _ids()
    twice = torch.zeros_like(ids)
    assert not _found(ids=twice, weight=weight)  # one expert twice a token
    assert not _found(ids=ids - 1, weight=weight) and not _found(ids=ids * 9, weight=weight)
    assert not _found(ids=ids, weight=weight * float("nan"))
