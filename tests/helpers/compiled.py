"""Step graphs built once: vectorised stages, from which any policy's graphs follow in a moment."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from moeca_fx.graph.expert_stack import stack_in_place
from moeca_fx.graph.sites import Sites
from moeca_fx.passes.cache.graphs import CachedGraphs
from moeca_fx.passes.insert_cache import insert_cache
from moeca_fx.passes.vectorize_experts import vectorize_experts
from moeca_fx.policies import Method
from tests.helpers.passes import staged


@dataclass(frozen=True)
class Vectorized:
    """A vectorised graph with its sites."""

    model: nn.Module
    module: fx.GraphModule
    sites: Sites

    def graphs(self, policy: Method) -> CachedGraphs:
        """Full and cached step under a policy."""
        return insert_cache(self.module, self.sites, policy.policy())


def vectorized(model: nn.Module, inputs: tuple[Tensor, ...]) -> Vectorized:
    """Run the passes up to vectorize_experts."""
    stage = staged(model, inputs)
    with torch.no_grad():
        for region in stage.captured.regions.values():
            stack_in_place([model.get_submodule(path) for path in region.experts])
        sites = vectorize_experts(stage.normalized, stage.sites, stage.captured.regions, model)
    return Vectorized(model, stage.normalized, sites)


def run_steps(
    graphs: CachedGraphs, steps: Sequence[tuple[Tensor, ...]], outputs: int = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """One full step, then cached ones: the first output of each, and the counters of the cached steps."""
    batch = steps[0][0].shape[0]
    carried = [torch.zeros(batch, *s.shape, dtype=s.dtype) for s in graphs.states if s.carried]
    results: list[Tensor] = []
    counters: list[Tensor] = []
    states: list[Tensor] = []
    with torch.no_grad():
        for index, leaves in enumerate(steps):
            if index == 0:
                out, states = _split(graphs.full(*leaves, *carried), outputs)
            else:
                out, (*states, counted) = _split(graphs.cached(*leaves, *states), outputs)
                counters.append(counted)
            results.append(out[0])
    return results, counters


def _split(values: tuple[Tensor, ...], outputs: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(values[:outputs]), list(values[outputs:])
