"""`inspect`: what was found in a model, what will be reused, what it costs, and what was refused and why."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from moeca_fx.batch import at_least_two, batch_size
from moeca_fx.discover import Layout, MoERegion, Refusal, discover
from moeca_fx.graph.rewrite import module_path
from moeca_fx.graph.sites import AttentionSite, MoESite, Site, kind_of
from moeca_fx.graph.slicing import between
from moeca_fx.graph.storage import CacheDtype, find_storage
from moeca_fx.model_checks import check_inputs, check_model, resolve_policy
from moeca_fx.model_copy import share_weights
from moeca_fx.passes import Compilation, run_pipeline
from moeca_fx.passes.capture import Captured
from moeca_fx.policies import Method, MoECa, Policy, as_method
from moeca_fx.runtime.flops import filled_branches, full_flops

_DEFAULT = MoECa()


@dataclass(frozen=True)
class SiteReport:
    """One site.

    Attributes:
        path, kind: module path, and ``"moe"``, ``"attention"`` or ``"dense_ffn"``.
        action: what it does on a cached step; see `passes/cache/plan.py`.
        experts, top_k: E and k of a MoE site, else None; where experts choose their tokens, `top_k` is how many each
            takes.
        layout: ``"token"`` where tokens choose their experts, ``"expert"`` where experts choose their tokens; None
            but for a MoE site.
        empty_slots: whether tokens may have fewer experts than `top_k`; `flops` are those without empty slots.
        router: form of its router, else None.
        shared_expert: module path of its shared expert, else None.
        flops: FLOPs of a full step at the example's batch size; flops_share: of the whole model's.
        cache_bytes: bytes of cache at that batch size.
    """

    path: str
    kind: str
    action: str
    experts: int | None
    top_k: int | None
    router: str | None
    shared_expert: str | None
    flops: int
    flops_share: float
    cache_bytes: int
    layout: Layout | None = None
    empty_slots: bool = False


@dataclass(frozen=True)
class InspectionReport:
    """What `inspect` found.

    Attributes:
        model: class name; batch: samples of the example inputs.
        sites: in network order.
        refused: (path, reason) of every candidate that is left alone.
        warnings: what the user should know.
        graphs: readable graph text after each pass: ``capture``, ``normalize``, ``locate``, ``vectorize_experts``,
            ``pack_stream``, ``insert_cache.full``, ``insert_cache.cached``, ``lower_inplace.cached``.
        flops: FLOPs of one full step.
        policy: fields of the policy.
    """

    model: str
    batch: int
    sites: tuple[SiteReport, ...]
    refused: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    graphs: dict[str, str]
    flops: int
    policy: dict[str, Any]

    @property
    def cache_bytes(self) -> int:
        """Bytes of cache of all sites."""
        return sum(site.cache_bytes for site in self.sites)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON, without the graphs."""
        content = asdict(self)
        del content["graphs"]
        content["refused"] = [{"path": path, "reason": reason} for path, reason in self.refused]
        return content | {"cache_bytes": self.cache_bytes}

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.sites)} sites, {self.flops:.3e} FLOPs a full step at batch {self.batch}"]
        width = max([28, *(len(site.path) + 2 for site in self.sites)])
        for site in self.sites:
            experts = f"{_routing(site)}, {site.router}" if site.kind == "moe" else ""
            shared = f", shared {site.shared_expert}" if site.shared_expert else ""
            lines.append(
                f"  {site.path:<{width}}{site.kind:<11}{site.action:<14}{site.flops_share:>6.1%}"
                f"{site.cache_bytes / 2**20:>9.2f} MiB  {experts}{shared}"
            )
        lines += [f"  left alone: {path or '(model)'}: {reason}" for path, reason in self.refused]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _routing(site: SiteReport) -> str:
    """E.g. ``"E8 top-2"``, or ``"E8 taking 64 tokens each"``."""
    most = "up to " if site.empty_slots else ""
    taken = f"{most}top-{site.top_k}" if site.layout == "token" else f"taking {site.top_k} tokens each"
    return f"E{site.experts} {taken}"


def inspect(
    model: nn.Module,
    example_inputs: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    policy: Method | Policy | str | PathLike[str] = _DEFAULT,
    *,
    cache_dtype: CacheDtype | None = None,
) -> InspectionReport:
    """Run discovery and every pass, and report; nothing is executed faster and the model stays as it is.

    Args:
        model, example_inputs, example_kwargs, policy, cache_dtype: as for `moeca_fx.transform`.

    Returns:
        The report. A model without any proven MoE layer gives a report without sites, whose refusals say why.

    Raises:
        UnsupportedModelError, InputError, CaptureError, PassError: as `moeca_fx.transform`.
    """
    chosen, storage = as_method(policy), find_storage(cache_dtype)
    parts = resolve_policy(chosen)
    kwargs = dict(example_kwargs or {})
    check_model(model)
    check_inputs(model, example_inputs, kwargs)
    found = discover(model, example_inputs, kwargs)
    batch = batch_size(example_inputs, kwargs)
    refused = [(refusal.path, refusal.reason) for refusal in found.refused]
    unproven = [refusal for refusal in found.refused if refusal.is_moe]
    if not found.regions or unproven:
        warnings = _why_not(unproven)
        return InspectionReport(type(model).__name__, batch, (), tuple(refused), warnings, {}, 0, chosen.as_dict())
    graphs: dict[str, str] = {}
    work = Compilation(share_weights(model), found.regions, example_inputs, kwargs, parts, storage)
    done = run_pipeline(work, observe=lambda stage, state: graphs.update(_texts(stage, state)))
    assert done.sites is not None and done.module is not None and done.graphs is not None
    assert done.captured is not None
    traced_inputs = at_least_two(example_inputs, kwargs) if done.captured.batch is None else (example_inputs, kwargs)
    leaves, traced = pytree.tree_leaves(traced_inputs), batch_size(*traced_inputs)
    filled = filled_branches(done.sites, traced)
    flops = {name: count * batch // traced for name, count in full_flops(done.module, leaves, filled).items()}
    total = sum(flops.values())
    actions = dict(done.graphs.actions)
    nodes = {node.name: node for node in done.module.graph.nodes}
    sites = []
    for site in done.sites.ordered:
        spent = _site_flops(site, nodes, flops)
        held = sum(state.bytes(batch) for state in done.graphs.states if state.site == site.path)
        sites.append(_site_report(site, actions[site.path], spent, total, held))
    return InspectionReport(
        model=type(model).__name__,
        batch=batch,
        sites=tuple(sites),
        refused=(*refused, *done.sites.left),
        warnings=(*_about_trace(done.captured), *_warnings(done.sites.ordered)),
        graphs=graphs,
        flops=total,
        policy=chosen.as_dict(),
    )


def _texts(stage: str, work: Compilation) -> dict[str, str]:
    if stage == "lower_linear":
        return {}  # other calls for the same products; seen in the last stage
    if stage == "lower_inplace":  # touches the rules' steps alone
        rules = work.graphs.rules if work.graphs is not None else ()
        return {f"lower_inplace.{rule.name}": graph_text(rule.module) for rule in rules}
    return {f"{stage}.{name}".rstrip("."): graph_text(module) for name, module in work.graph_modules().items()}


def graph_text(module: fx.GraphModule) -> str:
    """One line a node: its name, operation, operands, and the module of the original it comes from."""
    lines = []
    for node in module.graph.nodes:
        where = module_path(node)
        lines.append(_node_text(node) + (f"  # {where}" if where and node.op != "get_attr" else ""))
    return "\n".join(lines)


def _node_text(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    if node.op == "placeholder":
        return f"{node.name} = input"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    operation = str(node.target) if node.op == "call_module" else _operation(node.target)
    arguments = [str(argument) for argument in node.args] + [f"{key}={value}" for key, value in node.kwargs.items()]
    return f"{node.name} = {operation}({', '.join(arguments)})"


def _operation(target: Any) -> str:
    overload = getattr(target, "_overloadpacket", None)
    if overload is not None:
        return str(overload)
    return getattr(target, "__name__", str(target))


def _site_flops(site: Site, nodes: dict[str, fx.Node], flops: dict[str, int]) -> int:
    """FLOPs between the residual stream before and after the site."""
    inside = between([nodes[site.residual_in]], [nodes[site.residual_out]])
    return sum(flops[node.name] for node in inside)


def _site_report(site: Site, action: str, spent: int, total: int, held: int) -> SiteReport:
    moe = site if isinstance(site, MoESite) else None
    return SiteReport(
        path=site.path,
        kind=kind_of(site),
        action=action,
        experts=moe.num_experts if moe else None,
        top_k=moe.top_k if moe else None,
        router=moe.router if moe else None,
        shared_expert=moe.shared_path if moe else None,
        flops=spent,
        flops_share=spent / total,
        cache_bytes=held,
        layout=moe.layout if moe else None,
        empty_slots=moe is not None and moe.empty_slots,
    )


def _about_trace(captured: Captured) -> Iterator[str]:
    if captured.why_fixed is not None:
        yield f"the batch size cannot be left open: {captured.why_fixed}; each batch size is traced for itself"
    if not captured.proven:
        yield (
            "the model is on the meta device: nothing was proven on data, only structure and shapes were; proven with "
            f"random numbers for weights: {', '.join(_proven_layers(captured.regions.values()))}"
        )


def _proven_layers(regions: Iterable[MoERegion]) -> Iterator[str]:
    """Each layer that was proven, and for how many."""
    for path, count in Counter(region.proven_on for region in regions).items():
        yield path if count == 1 else f"{path}, for {count} layers of its structure and shapes"


def _warnings(sites: tuple[Site, ...]) -> Iterator[str]:
    for site in sites:
        if isinstance(site, AttentionSite) and site.refused is not None:
            yield f"{site.path}: computed in full under a branch rule: {site.refused}"
        elif isinstance(site, MoESite) and site.attention is None:
            yield f"{site.path}: no attention directly before it; its attention is not synchronized"
        elif isinstance(site, MoESite) and site.not_synchronized is not None:
            yield f"{site.path}: {site.attention} before it is not synchronized: {site.not_synchronized}"


def _why_not(unproven: list[Refusal]) -> tuple[str, ...]:
    if unproven:
        return tuple(f"{refusal.path} runs under a router but is not proven; transform refuses" for refusal in unproven)
    return ("no mixture-of-experts layer was found; transform refuses",)
