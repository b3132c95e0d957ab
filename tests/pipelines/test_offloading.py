"""Model offloading: accelerate's hook moves the whole denoiser, and graphs and caches follow."""

from typing import Any

import pytest
import torch

import moeca_fx
from moeca_fx.errors import UnsupportedModelError
from tests.helpers.offloading import CpuOffload, add_hook, remove_hook, storages
from tests.helpers.pipelines import TextPipeline, text_pipeline
from tests.helpers.requests import SOME, write


class Offloaded(TextPipeline):
    model_cpu_offload_seq = "transformer"


def offloaded(*, after: bool) -> tuple[Any, CpuOffload]:
    """A pipeline with a policy whose denoiser is offloaded before `apply` or after it."""
    pipe = text_pipeline()
    hook = CpuOffload()
    if not after:
        add_hook(pipe.transformer, hook)
    moeca_fx.apply(pipe, SOME)
    if after:
        add_hook(pipe.transformer, hook)
    return pipe, hook


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return write(moeca_fx.apply(text_pipeline(), SOME))


@pytest.mark.parametrize("after", [False, True], ids=["offloaded, applied", "applied, offloaded"])
def test_the_hook_runs_and_graphs_follow(after: bool, expected: torch.Tensor) -> None:
    plain = text_pipeline()
    pipe, hook = offloaded(after=after)
    assert torch.equal(write(pipe), expected) and hook.moves == 1
    fast = pipe.transformer._moeca_denoiser.fast
    programs = dict(fast._moeca.programs)
    for again in range(2, 4):
        remove_hook(pipe.transformer)  # what a pipeline does at its end
        hook = add_hook(pipe.transformer, CpuOffload())
        assert torch.equal(write(pipe), expected) and hook.moves == 1
        assert moeca_fx.stats(pipe).cached_steps == again * 8, "statistics go on"
    assert pipe.transformer._moeca_denoiser.fast is fast and fast._moeca.programs == programs, "nothing traced again"
    weights = storages(pipe.transformer)
    assert storages(fast) == weights, "one copy of the weights"
    assert storages(fast) >= {s for p in programs.values() for s in storages(p.plain) if s in storages(fast)} != set()
    with torch.no_grad():  # weights that are changed in place after a move
        for each in (pipe, plain):
            next(each.transformer.parameters()).mul_(1.5)
    assert torch.equal(write(pipe), write(moeca_fx.apply(plain, SOME)))


@pytest.mark.parametrize("after", [False, True], ids=["offloaded, applied", "applied, offloaded"])
def test_remove_gives_the_offloaded_model_back(after: bool) -> None:
    plain = write(text_pipeline())
    pipe, hook = offloaded(after=after)
    write(pipe)
    moeca_fx.remove(pipe)
    hook.init_hook(pipe.transformer)
    assert torch.equal(write(pipe), plain) and hook.moves == 2
    remove_hook(pipe.transformer)
    assert torch.equal(write(pipe), plain) and pipe.transformer.forward.__self__ is pipe.transformer
    write(moeca_fx.apply(pipe, SOME))


@pytest.mark.parametrize("after", [False, True], ids=["offloaded, applied", "applied, offloaded"])
def test_with_accelerate(after: bool, expected: torch.Tensor) -> None:
    pytest.importorskip("accelerate", reason="optional: its hook is imitated above")
    pipe = text_pipeline()
    pipe.__class__ = Offloaded
    if not after:
        pipe.enable_model_cpu_offload(device="cpu")
    moeca_fx.apply(pipe, SOME)
    if after:
        pipe.enable_model_cpu_offload(device="cpu")
    first = write(pipe)
    fast = pipe.transformer._moeca_denoiser.fast
    pipe.maybe_free_model_hooks()
    assert torch.equal(first, expected) and torch.equal(write(pipe), expected)
    assert pipe.transformer._moeca_denoiser.fast is fast
    pipe.remove_all_hooks()
    assert torch.equal(write(pipe), expected)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"layer by layer.*enable_model_cpu_offload"):
        write(pipe)
