"""`transform`: from an unmodified model to one of the same class that reuses expert branches across steps."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeVar

from torch import nn

from moeca_fx.batch import batch_size
from moeca_fx.errors import ConfigError, UnsupportedModelError
from moeca_fx.graph.expert_stack import stack_experts
from moeca_fx.graph.storage import CacheDtype, find_storage, stored_states
from moeca_fx.inputs import ordinary, ordinary_mode
from moeca_fx.model_checks import check_model, has_no_data, resolve_policy
from moeca_fx.model_copy import share_weights
from moeca_fx.passes import Compilation, run_pipeline
from moeca_fx.passes.insert_cache import plan_states
from moeca_fx.policies import Method, MoECa, Policy
from moeca_fx.proven_regions import find_regions
from moeca_fx.runtime.memory import MemoryReport, report
from moeca_fx.runtime.module import TransformedModel, make_transformed
from moeca_fx.runtime.options import memory_options
from moeca_fx.runtime.runtime import Runtime
from moeca_fx.runtime.timestep import Announced

Model = TypeVar("Model", bound=nn.Module)
_DEFAULT = MoECa()


@ordinary_mode()
def transform(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | Policy | str | PathLike[str] | None = _DEFAULT,
    *,
    timestep: str | int | Announced | None = None,
    compile: bool = True,
    cache_dtype: CacheDtype | None = None,
    cache_limit: int | str | None = None,
    chunk: int | None = None,
) -> TransformedModel:
    """Compile a DiT-MoE model into one that caches expert branches, attention and feed-forward rows.

    Args:
        model: any diffusion transformer with token-level mixture-of-experts layers, in eval mode. It is left untouched;
            the experts' parameters are re-pointed at one shared storage a layer, values unchanged.
        example_inputs, example_kwargs: inputs of one forward call, used to trace it. The batch size stays open; a
            model whose own code fixes it is traced once for each size it is called with.
        policy: what is recomputed when: a method such as `MoECa`, a method's name, a YAML policy file, or a `Policy` of
            your own parts; None vectorises the experts and caches nothing.
        timestep: name or position of forward's timestep parameter, when it is not found by itself; or
            `moeca_fx.runtime.timestep.ANNOUNCED` when all calls come in sessions, which need none.
        compile: run the graphs through `torch.compile`, each whole, at its first call (tens of seconds; the compiler's
            cache makes later processes start in seconds; the logger ``moeca_fx.compile`` tells). Without a compiler, or
            with the environment variable MOECA_FX_COMPILE=0, graphs run eagerly.
        cache_dtype: how reused vectors are stored: None in the model's dtype, ``"bf16"``, or ``"fp8"`` with an fp32
            scale for each. What a step computes keeps the model's dtype.
        cache_limit: most bytes of cache that one context may hold, or text such as ``"500MB"``. Samples beyond what
            fits are computed in full at every step.
        chunk: most samples that are computed at once; larger calls run in parts, each with caches of its own.

    Returns:
        A model of the same class: same signature, same result structure, weights shared with the original. See
        `TransformedModel` for contexts, statistics and memory.

    Raises:
        UnsupportedModelError: training mode, the meta device, hooks, quantised experts, a layer that cannot be
            rewritten, or a model that no cache can serve: samples that depend on each other, random numbers, state, a
            language model.
        NoMoEFoundError: no mixture-of-experts layer was found.
        UnprovenRegionError: a layer was found whose routing could not be proven.
        InputError: the example inputs do not fit the model.
        CaptureError, PassError: tracing or a graph pass failed.
        ConfigError: `policy` is none of these, an option is out of range, or not one sample fits into `cache_limit`.
    """
    parts = None if policy is None else resolve_policy(policy)
    options = memory_options(cache_dtype, cache_limit, chunk)
    args, kwargs = ordinary((example_inputs, dict(example_kwargs or {})))
    check_model(model)  # an offloaded model has its weights elsewhere, and hooks that say so
    if has_no_data(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is on the meta device: expected weights, found shapes, on which nothing can be "
            "proven; load the weights first. moeca_fx.inspect and moeca_fx.estimate_memory work without them"
        )
    found = find_regions(model, args, kwargs)
    stack_experts(model, found.regions)
    runtime = Runtime(found.regions, parts, timestep, options, compile)
    fast = make_transformed(model, runtime)
    runtime.prepare(fast, args, kwargs)
    return fast


@ordinary_mode()
def estimate_memory(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | Policy | str | PathLike[str] = _DEFAULT,
    *,
    batch: int | None = None,
    cache_dtype: CacheDtype | None = None,
) -> MemoryReport:
    """Bytes of cache that a transformed model will hold for one context, before any run.

    Args:
        model, example_inputs, example_kwargs, policy, cache_dtype: as for `transform`.
        batch: samples; the example's batch size by default.

    Raises:
        As `transform`.
    """
    parts, storage = resolve_policy(policy), find_storage(cache_dtype)
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ConfigError(f"batch: expected an integer >= 1, found {batch!r}; pass the batch size of the run")
    args, kwargs = ordinary((example_inputs, dict(example_kwargs or {})))
    found = find_regions(model, args, kwargs)
    work = Compilation(share_weights(model), found.regions, args, kwargs, parts)
    located = run_pipeline(work, until="locate")
    assert located.module is not None and located.sites is not None
    size = batch_size(args, kwargs) if batch is None else batch
    states = stored_states(plan_states(located.module, located.sites, parts), storage)
    return report(((state, state.bytes(size)) for state in states), size)
