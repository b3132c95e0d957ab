"""A program: the compiled graphs for one kind of call (structure, shapes but for the batch, dtypes, device, casts)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from moeca_fx.discover import MoERegion
from moeca_fx.errors import InputError
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.storage import Storage
from moeca_fx.model_checks import count_not_finite
from moeca_fx.passes import POLICY_FREE, Compilation, run_pipeline
from moeca_fx.passes.cache.graphs import CachedGraphs
from moeca_fx.policies.policy import Policy
from moeca_fx.runtime.compiler import CompiledStep, say_once, why_not_compiled
from moeca_fx.runtime.flops import StepFlops, filled_branches, measure_step_flops
from moeca_fx.runtime.lock import one_at_a_time
from moeca_fx.runtime.timestep import ANNOUNCED, Announced, find_timestep


@dataclass(frozen=True)
class Program:
    """Compiled graphs and how to call them.

    Attributes:
        traced: the model after the passes that no policy changes.
        plain: the vectorised graph, all there is without a policy.
        graphs: full step and one step a rule; None without a policy.
        sites: located sites.
        out_spec: structure of the model's result; `outputs` is its number of leaves.
        timestep: index of the timestep among the flat inputs; None when nobody needs it.
        steps: what is compiled, by the names of `CachedGraphs.modules`.
        why_fixed: why the graphs are for one batch size; None when they are for any.
    """

    traced: Compilation
    plain: fx.GraphModule
    graphs: CachedGraphs | None
    sites: Sites
    out_spec: pytree.TreeSpec
    outputs: int
    timestep: int | None
    steps: Mapping[str, CompiledStep]
    why_fixed: str | None = field(default=None, kw_only=True)

    def graph_modules(self) -> Iterator[nn.Module]:
        """The graphs, lowered ones too; some hold the same tensors."""
        assert self.traced.captured is not None
        yield from (self.traced.captured.module, self.traced_module, self.plain)
        yield from self.graphs.modules().values() if self.graphs is not None else ()
        yield from (step.module for step in self.steps.values())

    def run(self, name: str, batch: int, *inputs: Any) -> Any:
        """Run one of the graphs, compiled where that was asked for.

        Args:
            name: as in `CachedGraphs.modules`; "" is the vectorised graph.
            batch: samples.
        """
        if name in self.steps:
            return self.steps[name](batch, *inputs)
        if not name or self.graphs is None:
            return self.plain(*inputs)
        return self.graphs.modules()[name](*inputs)

    @property
    def batch(self) -> int | None:
        """The one batch size that the graphs are for; None when they are for any."""
        assert self.traced.captured is not None
        return self.traced.captured.batch

    @property
    def traced_module(self) -> fx.GraphModule:
        """The graph of `traced`."""
        assert self.traced.module is not None
        return self.traced.module

    @property
    def timestep_index(self) -> int:
        """`timestep`, where it is needed."""
        assert self.timestep is not None, "programs whose calls come outside of sessions have one"
        return self.timestep

    def device(self, leaves: list[Any]) -> torch.device:
        """Where caches live: with the timestep, or when there is none, with the largest input."""
        if self.timestep is not None:
            where: Tensor = leaves[self.timestep]
        else:
            where = max((leaf for leaf in leaves if isinstance(leaf, Tensor)), key=Tensor.numel)
        return where.device

    def cache_bytes(self, batch: int) -> int:
        """Bytes of cache that a context takes for a batch, as `estimate_memory` says."""
        if self.graphs is None:
            return 0
        probe = () if self.graphs.probe is None else (self.graphs.probe.state,)
        return sum(state.bytes(batch) for state in (*self.graphs.states, *probe))

    def step_flops(self, leaves: list[Any], batch: int) -> StepFlops:
        """FLOPs of the steps for inputs like `leaves`; nothing is executed."""
        filled = filled_branches(self.sites, batch)
        return measure_step_flops(self.plain, self.graphs, leaves, batch, filled)

    def split(self, results: tuple[Any, ...]) -> tuple[Any, list[Tensor]]:
        """The model's own result and the flat rest; results in a cache's memory are copied: later steps write there."""
        rest = list(results[self.outputs :])
        held = {_memory(tensor) for tensor in rest}
        own = [
            leaf.clone() if isinstance(leaf, Tensor) and _memory(leaf) in held else leaf
            for leaf in results[: self.outputs]
        ]
        return pytree.tree_unflatten(own, self.out_spec), rest


def _memory(tensor: Tensor) -> int:
    """Where the tensor's storage begins; asking the storage itself would make an object of it."""
    return tensor.data_ptr() - int(tensor.storage_offset()) * tensor.element_size()


@one_at_a_time
def build_program(
    model: nn.Module,
    regions: tuple[MoERegion, ...],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    policy: Policy | None,
    timestep: str | int | Announced | None,
    storage: Storage | None = None,
    compile: bool = False,
    fixed: str | None = None,
) -> Program:
    """Run the pipeline for calls like ``model(*args, **kwargs)``; `fixed` as for `Compilation`."""
    work = Compilation(model, regions, args, dict(kwargs), policy, storage, fixed)
    traced = run_pipeline(work, until=POLICY_FREE)
    return finish_program(traced, policy, timestep, compile)


def finish_program(
    traced: Compilation, policy: Policy | None, timestep: str | int | Announced | None, compile: bool = False
) -> Program:
    """Run the rest of the pipeline on what `POLICY_FREE` left, which stays as it is."""
    work = run_pipeline(replace(traced, policy=policy), after=POLICY_FREE)
    assert work.module is not None and work.captured is not None and work.sites is not None
    found = None
    if policy is not None and timestep is not ANNOUNCED:
        found = find_timestep(work.model, work.module, work.args, work.kwargs, timestep)
    return Program(
        traced=traced,
        plain=work.module,
        graphs=work.graphs,
        sites=work.sites,
        out_spec=work.captured.out_spec,
        outputs=work.captured.out_spec.num_leaves,
        timestep=found,
        steps=_compiled_steps(work) if compile else {},
        why_fixed=work.captured.why_fixed,
    )


def _compiled_steps(work: Compilation) -> dict[str, CompiledStep]:
    """Every graph, to be compiled at its first call."""
    modules = work.graph_modules()
    device = next((tensor.device for module in modules.values() for tensor in module.parameters()), torch.device("cpu"))
    reason = why_not_compiled(device)
    if reason is not None:
        say_once(f"graphs run eagerly, more slowly: {reason}")
        return {}
    return {name: CompiledStep(module, f"{name} step" if name else "model", device) for name, module in modules.items()}


def check_finite(leaves: list[Any]) -> None:
    """Refuse NaN and infinity: one such value would stay in the caches for the rest of the trajectory.

    Raises:
        InputError: names the input by its position.
    """
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (bad := count_not_finite(leaf)):
            raise InputError(
                f"input {index} of the transformed model: expected finite values, found {bad} of {leaf.numel()} that "
                "are NaN or infinite; the trajectory was reset, fix the sampler and start it again"
            )
