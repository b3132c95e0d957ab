"""What fuzzing found, and that the harness itself works; fuzzing needs atheris, these do not."""

import random
import time
from itertools import product

import pytest

from moeca_fx.discover import discover
from moeca_fx.errors import CaptureError, InputError, PassError
from tests.fuzz.cases import Case, Unexpected, case_of, check, is_documented
from tests.fuzz.mutations import MUTATIONS
from tests.structures.model import build
from tests.structures.structure import Structure, is_valid


@pytest.mark.parametrize("seed", range(6))
def test_random_bytes_are_valid_cases(seed: int) -> None:
    generator = random.Random(seed)
    cases = [case_of(generator.randbytes(32)) for _ in range(40)]
    assert all(is_valid(case.structure) for case in cases)
    assert len({case.structure for case in cases}) > 30 and len({case.mutations for case in cases}) > 5


def test_no_bytes_are_a_case() -> None:
    assert case_of(b"") == Case(Structure(split="inline", top_k=1, shared="none"), 0, 1, (), False)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_taken_or_refused(name: str) -> None:
    check(Case(Structure(), 0, 2, (name,), transforms=False))


@pytest.mark.slow
def test_any_two_mutations_go_together() -> None:
    for pair in product(MUTATIONS, repeat=2):
        given = build(Structure(), seed=0, batch=2)
        for name in pair:
            given = MUTATIONS[name](*given)


def test_crashes_and_undocumented_errors_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_documented(PassError("a pass failed")) and not is_documented(CaptureError("something else"))
    assert is_documented(InputError("anything"))
    monkeypatch.setitem(MUTATIONS, "bf16", lambda model, args, kwargs: (None, args, kwargs))
    with pytest.raises(Unexpected, match="AttributeError"):
        check(Case(Structure(), 0, 2, ("bf16",), transforms=False))


def test_a_batch_of_nothing_is_refused() -> None:
    model, args, kwargs = build(Structure(routing="expert_choice", container="stacked_out_in", dispatch="onehot"))
    with pytest.raises(InputError, match="at least one sample"):
        discover(model, *MUTATIONS["no samples"](model, args, kwargs)[1:])


def test_values_that_equal_nothing_end_the_search() -> None:
    structure = Structure(
        routing="expert_choice",
        container="stacked_out_in",
        split="inline",
        gate="mlp",
        num_experts=6,
        rows="batched",
        selection="noisy",
        weights="renormalised_scaled",
        shared="none",
        returns="pair",
        attention="by_hand",
        data="tokens",
    )
    begin = time.perf_counter()
    found = discover(*MUTATIONS["NaN inputs"](*build(structure, 4, 3)))
    assert found.regions == () and any("NaN or infinity" in refusal.reason for refusal in found.refused)
    assert time.perf_counter() - begin < 60, "took 300 s and more"
