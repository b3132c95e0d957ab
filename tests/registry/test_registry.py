"""Entries: what they make possible, and that they are held to the proof."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeca_fx
from moeca_fx.discover import discover
from moeca_fx.errors import ConfigError, UnprovenRegionError
from moeca_fx.reasons import Reason
from moeca_fx.registry import Entry, load, register, registered, slices, unregister
from tests.helpers.toys import Blend, Quarry, toy, toy_inputs
from tests.registry import layers
from tests.registry.layers import ENTRY, Odd, with_

PATH = "storeys.0.layer"


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    assert registered() == ()
    yield
    for entry in registered():
        unregister(entry)


def _refusal(entry: Entry, dtype: torch.dtype = torch.float32) -> UnprovenRegionError:
    register(replace(entry, prefer=True))  # what discovery tries by itself takes seconds and is tested below
    inputs = tuple(value.to(dtype) for value in toy_inputs())
    with pytest.raises(UnprovenRegionError) as caught:
        moeca_fx.transform(toy(Odd).to(dtype), inputs)
    return caught.value


def _run(model: nn.Module, steps: int = 5) -> list[Tensor]:
    grid, _ = toy_inputs()
    with torch.no_grad():
        return [model(grid, torch.full((3,), 1 - step / 20)).clone() for step in range(steps)]


def test_without_the_entry_it_is_refused() -> None:
    with pytest.raises(UnprovenRegionError) as caught:
        moeca_fx.transform(toy(Odd), toy_inputs())
    assert caught.value.code is Reason.STACKED_FORM


def test_the_entry_is_proven_equal_and_reuses() -> None:
    register(ENTRY)
    model = toy(Odd)
    (region,) = discover(model, toy_inputs(), {}).regions
    assert (region.path, region.top_k, region.num_experts, region.entry) == (PATH, 2, 4, ENTRY)
    assert region.error <= 1e-5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _run(model)
    plain = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    for found, want in zip(_run(plain), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    fast = plain.with_policy(moeca_fx.MoECa(interval=4, tau0=3.0))
    torch.testing.assert_close(_run(fast)[0], expected[0], rtol=1e-5, atol=1e-5)
    stats = fast.stats()
    assert stats.cached_steps == 3 and stats.reuse_ratio > 0
    (site,) = [site for site in moeca_fx.inspect(model, toy_inputs()).sites if site.kind == "moe"]
    assert (site.path, site.experts, site.top_k) == (PATH, 4, 2)
    assert site.shared_expert == f"{PATH}.constant"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_its_graph_reads_the_models_own_weights() -> None:
    register(with_(prefer=True))
    model = toy(Odd)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    with torch.no_grad():
        model.storeys[0].layer.third.mul_(2)
    torch.testing.assert_close(_run(fast, 1)[0], _run(model, 1)[0], rtol=1e-5, atol=1e-5)


def test_a_transformed_model_keeps_its_entry() -> None:
    register(with_(prefer=True))
    model = toy(Odd)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    unregister("odd")
    inputs = toy_inputs(batch=2, seed=3)
    for other in (fast, copy.deepcopy(fast)):
        with torch.no_grad():
            torch.testing.assert_close(other(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnprovenRegionError):
        moeca_fx.transform(model, toy_inputs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_an_expert_that_is_one_percent_off_is_refused(factor: float, dtype: torch.dtype) -> None:
    error = _refusal(layers.one_expert_off(factor), dtype)
    assert error.code is Reason.ENTRY_UNPROVEN
    assert "expert 2 enters the sum with" in str(error) and "expert 1 enters" not in str(error)
    assert PATH in str(error) and "nothing was changed" in str(error)


def test_the_right_entry_is_proven_in_bf16() -> None:
    register(with_(prefer=True))
    inputs = tuple(value.bfloat16() for value in toy_inputs())
    assert len(discover(toy(Odd).bfloat16(), inputs, {}).regions) == 1


def _copies(layer: Odd) -> list[nn.Module]:
    return [copy.deepcopy(expert) for expert in layers.experts(layer)]


def _unlike(layer: Odd) -> list[nn.Module]:
    return [*layers.experts(layer)[:3], nn.Linear(16, 16)]


def _raises(*_: Any) -> Any:
    raise KeyError("lost")


def _flat_ids(layer: Odd, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, which, share = layers.route(layer, z)
    return rows, which.flatten(), share


def _too_high(layer: Odd, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, which, share = layers.route(layer, z)
    return rows, which + 1, share


def _no_shared(_layer: Odd, routed: Tensor, z: Tensor) -> Tensor:
    return routed.view(z.shape)


def _pair(layer: Odd, routed: Tensor, z: Tensor) -> tuple[Tensor, None]:
    return layers.finish(layer, routed, z), None


WRONG = {
    "copied experts": (with_(experts=_copies), Reason.ENTRY_FAILED, "experts: expected parameter 'first' to be the"),
    "unlike experts": (with_(experts=_unlike), Reason.ENTRY_FAILED, "same names and shapes"),
    "one expert": (with_(experts=lambda layer: layers.experts(layer)[:1]), Reason.ENTRY_FAILED, "at least two modules"),
    "a failing route": (with_(route=_raises), Reason.ENTRY_FAILED, "route: raised KeyError: 'lost'"),
    "a pair": (with_(route=lambda *a: layers.route(*a)[:2]), Reason.ENTRY_FAILED, "expected (rows, ids, weights)"),
    "shapes": (with_(route=_flat_ids), Reason.ENTRY_FAILED, "of one shape"),
    "ids beyond": (with_(route=_too_high), Reason.ENTRY_FAILED, "expected ids below 4, found 1 to 4"),
    "a failing finish": (with_(finish=_raises), Reason.ENTRY_FAILED, "finish: raised KeyError"),
    "no finish": (with_(finish=None), Reason.ENTRY_UNPROVEN, "its replay gives (18, 16)"),
    "another result": (with_(finish=_pair), Reason.ENTRY_FAILED, "found tuple, where the module returns Tensor"),
    "no shared expert": (with_(finish=_no_shared), Reason.ENTRY_UNPROVEN, "differs from storeys.0.layer.forward by"),
    "no such method": (with_(region="dispatch"), Reason.ENTRY_FAILED, "a method of Odd, found no 'dispatch'"),
}


@pytest.mark.parametrize(("entry", "code", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_entries_are_refused_and_named(entry: Entry, code: Reason, message: str) -> None:
    error = _refusal(entry)
    assert error.code is code
    assert "entry 'odd'" in str(error) and message in str(error)


def test_why_it_was_not_found_out_stays_in_the_message() -> None:
    register(with_(route=_raises))
    (refusal,) = discover(toy(Odd), toy_inputs(), {}).refused
    assert refusal.is_moe and refusal.codes == (Reason.ENTRY_FAILED, Reason.STACKED_FORM)
    assert "route: raised KeyError" in refusal.reason and "no known form of an expert" in refusal.reason


def test_a_method_may_be_the_region() -> None:
    def finish(_layer: Odd, routed: Tensor, _rows: Tensor) -> Tensor:
        return routed

    register(with_(region="routed", finish=finish, prefer=True))
    model = toy(Odd)
    (region,) = discover(model, toy_inputs(), {}).regions
    assert (region.path, region.method) == (PATH, "routed")
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    torch.testing.assert_close(_run(fast, 1)[0], _run(model, 1)[0], rtol=1e-5, atol=1e-5)


class Choosing(Odd):
    """Experts choose their tokens."""

    def routed(self, rows: Tensor) -> Tensor:
        samples = rows.view(-1, 6, 16)
        share, token = self.compass(samples).softmax(-1).transpose(1, 2).topk(3, dim=-1)  # [B, E, C]
        out = torch.zeros_like(samples)
        for number, expert in enumerate(layers.experts(self)):
            place = token[:, number, :, None].expand(-1, -1, 16)
            out = out.scatter_add(1, place, expert(samples.gather(1, place)) * share[:, number, :, None])
        return out.reshape(rows.shape)


def test_experts_may_choose() -> None:
    def route(layer: Choosing, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share, token = layer.compass(z).softmax(-1).transpose(1, 2).topk(3, dim=-1)
        return z, token, share

    register(with_(match=Choosing, route=route, layout="expert", prefer=True))
    model = toy(Choosing)
    (region,) = discover(model, toy_inputs(), {}).regions
    assert (region.layout, region.top_k) == ("expert", 3)
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    torch.testing.assert_close(_run(fast, 1)[0], _run(model, 1)[0], rtol=1e-5, atol=1e-5)


BLEND = Entry(
    name="blend",
    match=Blend,
    route=lambda layer, z: (rows := z.flatten(0, 1), *layer.choose(rows)),
    experts=lambda layer: list(layer.quarry.stones),
    finish=lambda layer, routed, z: routed.view(z.shape) + layer.constant(z),
)


def test_automatic_proof_comes_first() -> None:
    register(BLEND)
    (region,) = discover(toy(), toy_inputs(), {}).regions
    assert (region.path, region.entry) == (f"{PATH}.quarry", None)


def test_unless_the_entry_is_preferred() -> None:
    entry = register(replace(BLEND, prefer=True))
    model = toy()
    (region,) = discover(model, toy_inputs(), {}).regions
    assert (region.path, region.entry) == (PATH, entry)
    assert region.experts == tuple(f"{PATH}.quarry.stones.{index}" for index in range(4))
    fast = moeca_fx.transform(model, toy_inputs(), policy=None, compile=False)
    torch.testing.assert_close(_run(fast, 1)[0], _run(model, 1)[0], rtol=1e-5, atol=1e-5)


def test_an_entry_for_a_module_that_is_not_there_changes_nothing() -> None:
    register(ENTRY)
    assert [region.entry for region in discover(toy(), toy_inputs(), {}).regions] == [None]


@pytest.mark.parametrize("other", [lambda module: type(module) is Odd, nn.ModuleList], ids=["same", "around"])
def test_two_entries_for_one_module_clash(other: Any) -> None:
    register(ENTRY)
    register(with_(name="other", match=other))
    with pytest.raises(ConfigError, match=r"storeys\.0\.layer.*'od?t?her', 'odd'|.*'odd', 'other'") as caught:
        moeca_fx.transform(toy(Odd), toy_inputs())
    assert caught.value.code is Reason.ENTRIES_CLASH


def test_names_are_their_own() -> None:
    assert register(ENTRY) is register(ENTRY)
    with pytest.raises(ConfigError, match="another entry is called 'odd'"):
        register(with_(match=Quarry))
    with pytest.raises(ConfigError, match=r"found 'even'; registered: odd"):
        unregister("even")
    unregister(ENTRY)
    assert registered() == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "expected a name"),
        ({"route": 3}, "route: expected a function, found int"),
        ({"layout": "row"}, "layout: expected one of"),
        ({"layout": "expert", "empty_slots": True}, "empty_slots: expected False"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_(**fields)


def test_only_entries_are_registered() -> None:
    with pytest.raises(ConfigError, match=r"expected a moeca_fx\.registry\.Entry, found type"):
        register(Odd)  # type: ignore[arg-type]


def test_slices_are_of_one_size() -> None:
    layer = Odd()
    layer.pitch = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="one leading size"):
        slices(layer, ("first", "pitch"), layers.compute)


def test_an_entry_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "odd_entry.py"
    file.write_text("from tests.registry.layers import ENTRY\n")
    assert load(file) is ENTRY and registered() == (ENTRY,)
    for text, message in (("1 / 0", "ZeroDivisionError"), ("ENTRY = 3", "found int")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load(file)
    with pytest.raises(ConfigError, match="expected a Python file, found none"):
        load(tmp_path / "nothing.py")
