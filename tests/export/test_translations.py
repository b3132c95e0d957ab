"""Every operation that stays whole for ONNX: its translation computes what the function does, in onnxruntime."""

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from moeca_fx.export.graph import BATCH, ExportGraph, Port
from moeca_fx.export.lengths import LENGTHS
from moeca_fx.export.onnx.file import make_onnx, save_onnx
from moeca_fx.export.onnx.translations import translations
from moeca_fx.export.onnx.whole import NAMESPACE, WHOLE, Lengths
from moeca_fx.ops import bounded, dispatch, rows, slot_decisions, slots
from moeca_fx.policies import branch
from tests.helpers.grids import slow

pytestmark = pytest.mark.artefact

TOKENS, TOP_K, EXPERTS, WIDTH, HEADS = 5, 2, 4, 6, 3
WEIGHT = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
ONE_BY_ONE = "branches of one expert after another"
SCALE = torch.arange(1, EXPERTS + 1, dtype=torch.float32).view(-1, 1, 1)  # what an expert does to its rows


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _experts(seed: int, batch: int, tokens: int = TOKENS) -> Tensor:
    """k distinct experts a token."""
    return _random(seed, batch, tokens, EXPERTS).argsort(-1)[..., :TOP_K].contiguous()


def _masks(batch: int) -> list[Tensor]:
    """No token, the last one, some, all."""
    none = torch.zeros(batch, TOKENS, dtype=torch.bool)
    last = none.clone()
    last[-1, -1] = True
    return [none, last, _random(7, batch, TOKENS) > 0.3, ~none]


def _codes(batch: int) -> list[Tensor]:
    some = _random(9, batch, TOKENS, TOP_K).gt(0.2).long() * _random(10, batch, TOKENS, TOP_K).gt(0).long().add(1)
    one = torch.zeros_like(some)
    one[0, 2, 1] = 2
    return [torch.zeros_like(some), one, some, torch.ones_like(some)]


def _write(cache: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    row, valid = bounded.select_rows(mask)
    return bounded.write_rows(cache, row, rows.gather_rows(values, row, 0, 1).squeeze(1), valid)


def _count(mask: Tensor) -> Any:
    row, valid = bounded.select_rows(mask)
    written = bounded.write_rows(mask.to(torch.int64), row, torch.zeros_like(row), valid)
    return bounded.count_valid(valid), slots.count_padded(mask), written


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    row, valid = bounded.select_rows(mask)
    attended = bounded.attention_rows(rows.gather_rows(query, row, 0, 1).squeeze(1), key, value, row, mask, None)
    return bounded.write_rows(torch.zeros_like(query), row, attended, valid)


def _run_branches(x: Tensor, code: Tensor, expert: Tensor, cache: Tensor, scale: Tensor) -> Tensor:
    local, _, place = bounded.plan_padded(code, expert, EXPERTS)
    hidden = dispatch.take_rows(x, local).reshape(EXPERTS, -1, WIDTH)
    return bounded.write_branches(cache, bounded.take_branches((hidden * scale).flatten(0, 1), code, place), code, None)


def _run_every_expert(x: Tensor, code: Tensor, expert: Tensor, cache: Tensor, scale: Tensor) -> Tensor:
    local, _, place = bounded.plan_dense(code, expert, EXPERTS)
    hidden = dispatch.take_rows(x, local).reshape(EXPERTS, -1, WIDTH)
    return bounded.write_branches(cache, bounded.take_branches((hidden * scale).flatten(0, 1), code, place), code, None)


def _run_one_by_one(x: Tensor, code: Tensor, expert: Tensor, cache: Tensor, weight: Tensor) -> Tensor:
    local, _, place, offsets = bounded.plan_grouped(code, expert, EXPERTS)
    hidden = torch.ops.moeca.grouped_linear(dispatch.take_rows(x, local), weight, None, offsets)
    return bounded.write_computed(cache, hidden, place, code, None)


def _run_branches_of_rows(x: Tensor, mask: Tensor, code: Tensor, expert: Tensor, cache: Tensor) -> Tensor:
    row, valid = bounded.select_rows(mask)
    code, expert = (dispatch.take_rows(part, row).unsqueeze(1) for part in (code, expert))
    code = bounded.valid_code(code, valid)
    local, _, place = bounded.plan_padded(code, expert, EXPERTS)
    hidden = dispatch.take_rows(dispatch.take_rows(x, row), local).reshape(EXPERTS, -1, WIDTH) * 3
    return bounded.write_computed(cache, hidden.flatten(0, 1), place, code, row)


def _gather(x: Tensor, mask: Tensor, table: Tensor, sample: Tensor) -> Tensor:
    row, valid = bounded.select_rows(mask)
    parts = rows.gather_tokens(table, row, TOKENS, 0, 1), rows.gather_samples(sample, row, TOKENS, 0)
    total = rows.gather_rows(x, row, 0, 1) + parts[0] + parts[1].unsqueeze(1)
    return bounded.write_rows(torch.zeros_like(x), row, total.squeeze(1), valid)


def _decide(kind: Any) -> Callable[..., Any]:
    def decide(expert: Tensor, weight: Tensor, held: Tensor, then: Tensor, norm: Tensor, limit: Tensor) -> Any:
        made = branch.decide(expert, weight, held, then, norm, limit, 0.5, 0.25, kind, code_dtype=torch.int64)
        slot, slot_expert, slot_weight, code = made
        return slot, slot_expert, slot_weight, code

    return decide


def _decide_slots(kind: Any) -> Callable[..., Any]:
    def decide(expert: Tensor, weight: Tensor, held: Tensor, then: Tensor, norm: Tensor, limit: Tensor) -> Any:
        part = slot_decisions.part_of_norms(norm, 0.25)
        by_slot, slot_expert, slot_weight, code = slot_decisions.decide_slots(
            expert, weight, held, then, part, limit, 0.5, kind
        )
        return part, by_slot, slot_expert, slot_weight, code

    return decide


def _refresh(
    expert: Tensor, weight: Tensor, held: Tensor, then: Tensor, norm: Tensor, limit: Tensor, force: Tensor
) -> Any:
    """The mask, and the weights of tokens that it leaves out."""
    part = slot_decisions.part_of_norms(norm, 0.25)
    mask, by_slot = slot_decisions.refreshed_tokens(expert, weight, held, then, part, limit, 0.5, "share")
    forced = slot_decisions.forced_tokens(mask, force)
    return mask, forced, torch.where(mask.unsqueeze(-1), 0.0, by_slot)


def _refreshes(batch: int) -> list[tuple[Tensor, ...]]:
    """Decisions in which some tokens match: those held what they are routed to, in another order."""
    made = []
    for expert, weight, held, then, norm, limit in _decisions(batch):
        stays = torch.arange(TOKENS) > 1
        held = torch.where(stays[:, None], expert.flip(-1), held)
        made += [(expert, weight, held, then, norm, limit + 1, torch.tensor(force)) for force in (False, True)]
    return made


def _decisions(batch: int) -> list[tuple[Tensor, ...]]:
    made = []
    for seed in range(3):
        weight = _random(seed, batch, TOKENS, TOP_K).abs()
        weight[0, 0] = 0
        norm = _random(seed + 50, batch, TOKENS, TOP_K).abs()
        norm[0, 1] = 0
        held = torch.full((batch, TOKENS, TOP_K), -1) if seed == 2 else _experts(seed + 20, batch)
        then = _random(seed + 40, batch, TOKENS, TOP_K).abs()
        made.append((_experts(seed, batch), weight, held, then, norm, _random(seed + 60, batch, EXPERTS).abs()))
    return made


def _narrow_decisions(batch: int) -> list[tuple[Tensor, ...]]:
    """Weights of a router in fp16, what is cached in fp32."""
    return [(expert, weight.half(), *rest) for expert, weight, *rest in _decisions(batch)]


def _histories(batch: int) -> list[tuple[Tensor, ...]]:
    some = _random(3, batch, EXPERTS, TOKENS).abs()
    some[0, 0] = 0
    return [(some,), (torch.zeros_like(some),), (torch.ones_like(some),)]


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], list[tuple[Tensor, ...]]]]] = {
    "write_rows": (
        _write,
        lambda b: [(_random(1, b, TOKENS, WIDTH), mask, _random(2, b, TOKENS, WIDTH)) for mask in _masks(b)],
    ),
    "attention_rows": (
        _attend,
        lambda b: [(*(_random(s, b, TOKENS, HEADS, WIDTH) for s in range(3)), mask) for mask in _masks(b)],
    ),
    "grouped queries": (
        _attend,
        lambda b: [
            (_random(0, b, TOKENS, HEADS, WIDTH), *(_random(s, b, TOKENS, 1, WIDTH) for s in (1, 2)), mask)
            for mask in _masks(b)
        ],
    ),
    "gather": (
        _gather,
        lambda b: [
            (_random(1, b, TOKENS, WIDTH), mask, _random(2, 1, TOKENS, WIDTH), _random(3, b, WIDTH))
            for mask in _masks(b)
        ],
    ),
    "branches": (
        _run_branches,
        lambda b: [
            (_random(1, b, TOKENS, WIDTH), code, _experts(2, b), _random(3, b, TOKENS, TOP_K, WIDTH), SCALE)
            for code in _codes(b)
        ],
    ),
    "branches of every expert": (
        _run_every_expert,
        lambda b: [
            (_random(1, b, TOKENS, WIDTH), code, _experts(2, b), _random(3, b, TOKENS, TOP_K, WIDTH), SCALE)
            for code in _codes(b)
        ],
    ),
    ONE_BY_ONE: (
        _run_one_by_one,
        lambda b: [
            (
                _random(1, b, TOKENS, WIDTH),
                c,
                _experts(2, b),
                _random(3, b, TOKENS, TOP_K, WIDTH),
                _random(4, EXPERTS, WIDTH, WIDTH),
            )
            for c in _codes(b)
        ],
    ),
    "branches of rows": (
        _run_branches_of_rows,
        lambda b: [
            (_random(1, b, TOKENS, WIDTH), mask, code, _experts(2, b), _random(3, b, TOKENS, TOP_K, WIDTH))
            for mask in _masks(b)
            for code in _codes(b)[1:]
        ],
    ),
    "decide by share": (_decide("share"), _decisions),
    "decide by raw weight": (_decide("raw"), _decisions),
    "decide by share of fp16 weights": (_decide("share"), _narrow_decisions),
    "decide by raw weight in fp16": (_decide("raw"), _narrow_decisions),
    "decide_slots by share": (_decide_slots("share"), _decisions),
    "decide_slots by raw weight": (_decide_slots("raw"), _decisions),
    "decide_slots by share of fp16 weights": (_decide_slots("share"), _narrow_decisions),
    "refreshed_tokens": (_refresh, _refreshes),
    "expert_threshold": (lambda a: branch.expert_threshold(a, 0.6, 0.5, "minmax"), _histories),
    "expert_threshold by tokens": (lambda a: branch.expert_threshold(a, 0.6, 0.5, "log"), _histories),
    "update_activation": (
        lambda a, e: bounded.update_activation(a, e, 0.7),
        lambda b: [(_random(1, b, EXPERTS, TOKENS).abs(), _experts(seed, b)) for seed in range(2)],
    ),
    "to_slots": (
        lambda v, s: branch.to_slots(v, s),
        lambda b: [(_random(1, b, TOKENS, TOP_K), _random(2, b, TOKENS, TOP_K).argsort(-1))],
    ),
    "forced_code": (
        lambda c, f: slots.forced_code(c, f),
        lambda b: [(c, torch.tensor(f)) for c in _codes(b) for f in (True, False)],
    ),
    "padded experts": (
        lambda x, w, b: (bounded.grouped_linear(x, w, None), bounded.grouped_linear(x, w, b)),
        lambda _: [(_random(1, EXPERTS * 2, WIDTH), WEIGHT, _random(5, EXPERTS, WIDTH))],
    ),
    "rows counted": (_count, lambda b: [(mask,) for mask in _masks(b)]),
    "token_mask": (lambda c: slots.token_mask(c), lambda b: [(code,) for code in _codes(b)]),
    "combine_slots": (
        lambda f, w: dispatch.combine_slots(f, w),
        lambda b: [(_random(1, b, TOKENS, TOP_K, WIDTH), _random(2, b, TOKENS, TOP_K))],
    ),
    "feature_norm": (
        lambda f: dispatch.feature_norm(f),
        lambda b: [(_random(1, b, TOKENS, TOP_K, WIDTH),), (torch.zeros(b, TOKENS, TOP_K, WIDTH),)],
    ),
    "feature_norm of fp16 features": (
        lambda f: dispatch.feature_norm(f),
        lambda b: [((500 * _random(1, b, TOKENS, WIDTH)).half(),)],  # whose squares are beyond fp16
    ),
    "combine_slots of fp16 features": (
        lambda f, w: dispatch.combine_slots(f, w),
        lambda b: [(_random(1, b, TOKENS, TOP_K, WIDTH).half(), _random(2, b, TOKENS, TOP_K))],
    ),
    "stable sort": (
        lambda x: x.argsort(dim=1, descending=True, stable=True),
        lambda b: [(_random(1, b, 9).round(),), (torch.zeros(b, 9),)],
    ),
}


def _call(tracer: fx.proxy.GraphAppendingTracer, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tracer.create_proxy("call_function", target, args, kwargs)


def _graph(function: Callable[..., Any]) -> fx.GraphModule:
    """The function's calls of the project's operations, each a node."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    inputs = [fx.Proxy(graph.placeholder(name), tracer) for name in inspect.signature(function).parameters]
    with pytest.MonkeyPatch.context() as patch:
        for whole in {*WHOLE, dispatch.take_rows}:
            module, name = sys.modules[whole.__module__], whole.__name__
            patch.setattr(module, name, partial(_call, tracer, whole))
        made = function(*inputs)
    graph.output(tuple(part.node for part in (made if isinstance(made, tuple) else (made,))))
    return fx.GraphModule(nn.Module(), graph)


def _exported(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], folder: Path, lengths: Lengths
) -> onnxruntime.InferenceSession:
    """The function with an open batch, every operation of the project whole."""
    module = _graph(function)
    ports = [
        Port(f"in{index}", (BATCH, *value.shape[1:]) if value.shape[:1] == (3,) else tuple(value.shape), value.dtype)
        for index, value in enumerate(inputs)
    ]
    outputs = [Port(f"out{index}", (), torch.float32) for index in range(len(module.graph.output_node().args[0]))]  # type: ignore[arg-type]  # a tuple
    made = make_onnx(ExportGraph("case", module, tuple(ports), tuple(outputs), inputs, ()), 8, lengths=lengths)
    save_onnx({"case": made}, folder, external=False)
    return onnxruntime.InferenceSession(str(folder / "case.onnx"), providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, case: tuple[Tensor, ...]) -> Iterator[list[Any]]:
    """Its results; where it takes the lengths of lists, given all entries, and then exactly what those needed."""
    names = [item.name for item in session.get_inputs()]
    given = {name: value.numpy() for name, value in zip(names, case, strict=False)}
    if names[-1] != LENGTHS:
        assert len(names) == len(case)
        yield session.run(None, given)
        return
    (count,) = session.get_inputs()[-1].shape
    *made, needed = session.run(None, given | {LENGTHS: numpy.full(count, 10**6)})
    yield made
    *made, again = session.run(None, given | {LENGTHS: needed})
    assert needed.tolist() == again.tolist()
    yield made
    if needed.max() > 2:  # fewest entries of a list
        *_, seen = session.run(None, given | {LENGTHS: numpy.minimum(needed, 2)})
        assert seen.max() > 2, "a list that was too short tells so"


# Another form of a case beside it.
SLOW = ("grouped queries", "decide by raw weight", "decide_slots by raw weight", "expert_threshold by tokens")


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        slow(name, lengths) if name in SLOW else (name, lengths)
        for name in CASES
        for lengths in get_args(Lengths)
        if (name, lengths) != (ONE_BY_ONE, "input")  # a length for each expert, which `to_onnx` refuses
    ],
)
def test_a_translation_computes_what_the_function_does(name: str, lengths: Lengths, tmp_path: Path) -> None:
    function, inputs = CASES[name]
    session = _exported(function, inputs(3)[0], tmp_path, lengths)
    for batch in (1, 3, 5):
        for case in inputs(batch):
            expected = function(*case)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for made in _run(session, case):
                for found, want in zip(made, expected, strict=True):
                    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-5, atol=1e-6)


def test_every_operation_is_translated_and_tried() -> None:
    assert all(set(WHOLE.values()) <= set(translations(lengths)) for lengths in get_args(Lengths))
    assert {operation.namespace for operation in WHOLE.values()} == {NAMESPACE}
    tried = {node.target for function, _ in CASES.values() for node in _graph(function).graph.nodes}
    assert set(WHOLE) <= tried


def test_what_stands_for_a_function_computes_it() -> None:
    mask = _masks(3)[2]
    row, valid = bounded.select_rows(mask)
    operation = WHOLE[bounded.select_rows]
    assert all(torch.equal(have, want) for have, want in zip(operation(mask), (row, valid), strict=True))
    operation = WHOLE[rows.gather_rows]
    x = _random(1, 3, TOKENS, WIDTH)
    assert torch.equal(operation(x, row, 0, 1), x[mask].unsqueeze(1))
