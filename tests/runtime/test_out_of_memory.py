"""A step that runs out of memory: a clear error, freed caches, and a model that goes on."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

import moeca_fx
from moeca_fx.errors import MoecaError, OutOfMemoryError
from moeca_fx.runtime.module import TransformedModel
from tests.helpers import zoo_models
from tests.helpers.toys import toy_inputs
from tests.helpers.transformed import SOME, run, toy_pair, zoo_pair


def _really() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _on_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def _in_python() -> None:
    raise MemoryError


REFUSALS: dict[str, tuple[Callable[[], None], str]] = {
    "CPU allocator": (_really, "DefaultCPUAllocator"),
    "device": (_on_a_device, r"CUDA out of memory\. Tried to allocate 2\.00 GiB\.\. The caches"),
    "Python": (_in_python, "MemoryError"),
}


def _failing(fast: TransformedModel, patch: pytest.MonkeyPatch, fail: Callable[[], None], graph: str) -> None:
    """Let a graph of the model fail once it is entered."""
    (program,) = fast._moeca.programs.values()
    module = program.plain if program.graphs is None else program.graphs.modules()[graph]
    patch.setattr(module, "forward", lambda *_: fail())


@pytest.mark.parametrize("kind", REFUSALS)
def test_the_error_names_sizes_and_options_and_the_next_call_works(kind: str) -> None:
    fail, words = REFUSALS[kind]
    _, fast = zoo_pair()
    steps = list(zoo_models.trajectory(4, 4))
    expected = run(fast, steps)
    held = fast.memory().total / 2**20
    fast.reset()
    fast.reset_stats()
    run(fast, steps[:2])
    with pytest.MonkeyPatch.context() as patch:
        _failing(fast, patch, fail, "cached")
        with pytest.raises(OutOfMemoryError, match=words) as caught:
            run(fast, steps[2:3])
    message = str(caught.value)
    assert f"held {held:.1f} MiB" in message and f"gives {held:.1f} MiB for a context of 4 samples" in message
    assert all(option in message for option in ("chunk=2", "cache_dtype='bf16' or 'fp8'", "cache_limit="))
    assert isinstance(caught.value, MoecaError | MemoryError) and isinstance(caught.value, RuntimeError)
    assert fast.memory().total == 0
    for have, want in zip(run(fast, steps), expected, strict=True):
        assert torch.equal(have, want)
    assert fast.stats().trajectories == 2


def test_the_memory_is_free_while_the_error_is_handled() -> None:
    _, fast = zoo_pair()
    steps = list(zoo_models.trajectory(2, 3))
    run(fast, steps[:2])
    caches = [weakref.ref(tensor) for tensor in fast.cache().values()]
    with pytest.MonkeyPatch.context() as patch:
        _failing(fast, patch, _on_a_device, "cached")
        try:
            run(fast, steps[2:])
        except OutOfMemoryError as error:
            gc.collect()
            assert error.__cause__ is None and error.__context__ is None
            assert [ref() for ref in caches if ref() is not None] == []


def test_other_contexts_go_on() -> None:
    _, fast = zoo_pair()
    steps = list(zoo_models.trajectory(2, 3))
    for name in ("a", "b"):
        with fast.context(name):
            run(fast, steps[:2])
    one = fast.memory().total // 2
    with pytest.MonkeyPatch.context() as patch, fast.context("a"):
        _failing(fast, patch, _in_python, "cached")
        with pytest.raises(OutOfMemoryError):
            run(fast, steps[2:])
    assert fast.cache("a") == {} and fast.memory().total == one


def test_a_failing_chunk_ends_the_trajectories_of_all() -> None:
    fast = moeca_fx.transform(zoo_models.tiny_dsmoe(), zoo_models.inputs(), policy=SOME, chunk=2)
    steps = list(zoo_models.trajectory(4, 2))
    run(fast, steps[:1])
    calls = 0
    (program,) = fast._moeca.programs.values()
    assert program.graphs is not None
    forward = program.graphs.cached.forward

    def second(*args: object) -> object:
        nonlocal calls
        calls += 1
        return _in_python() if calls == 2 else forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.graphs.cached, "forward", second)
        with pytest.raises(OutOfMemoryError, match="chunk=2"):
            run(fast, steps[1:])
    assert calls == 2 and fast._moeca.trajectories == {}


def test_without_a_policy_and_on_the_first_step() -> None:
    for policy, graph in ((None, ""), (SOME, "full")):
        _, fast = toy_pair(policy)
        with pytest.MonkeyPatch.context() as patch:
            _failing(fast, patch, _really, graph)
            with pytest.raises(OutOfMemoryError, match=r"held 0\.0 MiB"):
                run(fast, [toy_inputs()])
        run(fast, [toy_inputs()])


def test_what_is_no_shortage_is_raised_as_it_is() -> None:
    _, fast = toy_pair()

    def fail() -> None:
        raise RuntimeError("the shapes do not fit")

    with pytest.MonkeyPatch.context() as patch:
        _failing(fast, patch, fail, "full")
        with pytest.raises(RuntimeError, match="the shapes do not fit") as caught:
            run(fast, [toy_inputs()])
    assert not isinstance(caught.value, MoecaError) and fast._moeca.trajectories == {}
