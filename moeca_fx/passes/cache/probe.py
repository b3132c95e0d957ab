"""The probe of an adaptive schedule: the beginning of the model, up to the value whose change decides.

probe:  m = modulate(norm(x0))   change = mean|m - m0| / (mean|m0| + epsilon)             TeaCache
probe:  xF = first F blocks(x0)  m = xF - x0, change likewise; the step continues at xF    first-block cache
"""

import torch
from torch import Tensor, fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.blocks import blocks_of, check_one_stream
from moeca_fx.graph.rewrite import call, example_value, finish
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.slicing import LINEAR, between, strip_reshapes
from moeca_fx.graph.state import StateSpec
from moeca_fx.passes.cache.graphs import ProbeGraph
from moeca_fx.passes.cache.level import nodes_by_name
from moeca_fx.policies.schedule import Probe
from moeca_fx.reasons import Reason

SITE = "probe"


def relative_change(value: Tensor, before: Tensor, epsilon: float) -> Tensor:
    """``mean|m - m0| / (mean|m0| + epsilon)`` over the whole batch, [] fp32."""
    value, before = value.float(), before.float()
    return (value - before).abs().mean() / (before.abs().mean() + epsilon)


def continues_from(sites: Sites, probe: Probe | None) -> str | None:
    """Name of the token stream after the blocks that the probe runs, where the rest of the step continues."""
    if probe is None or probe.what != "first_blocks":
        return None
    check_one_stream(sites, "a first-block probe")
    blocks = blocks_of(sites)
    if not 1 <= probe.blocks < len(blocks):
        raise UnsupportedModelError(
            f"a first-block probe: expected 1 to {len(blocks) - 1} first blocks, found {probe.blocks}; choose another",
            code=Reason.POLICY,
        )
    return blocks[probe.blocks - 1].sites[-1].residual_out


def build_probe(module: fx.GraphModule, sites: Sites, probe: Probe) -> ProbeGraph:
    """Cut the probe out of `module`, a copy that it may edit."""
    nodes = nodes_by_name(module)
    stream = continues_from(sites, probe)
    output = module.graph.output_node()
    with module.graph.inserting_before(output):
        if stream is not None:
            start = nodes[sites.ordered[0].residual_in]
            value = call(module.graph, torch.sub, nodes[stream], start, name="first_blocks_residual")
            shape = example_value(nodes[stream])
        else:
            value = _modulated_input(nodes, sites)
            shape = example_value(value)
    state = StateSpec(SITE, "value", tuple(int(size) for size in shape.shape[1:]), shape.dtype)
    last = module.graph.find_nodes(op="placeholder")[-1]
    with module.graph.inserting_after(last):
        before = module.graph.placeholder(state.node_name)
    with module.graph.inserting_before(output):
        change = call(module.graph, relative_change, value, before, probe.epsilon, name="change")
    output.args = ((change, value, *([nodes[stream]] if stream is not None else [])),)
    return ProbeGraph(finish(module, "insert_cache (probe)"), state, probe.against == "last_step")


def _modulated_input(nodes: dict[str, fx.Node], sites: Sites) -> fx.Node:
    """What the first attention's projection reads."""
    if not sites.attention:
        raise UnsupportedModelError(
            "a probe of the modulated input: expected an attention sublayer, found none", code=Reason.POLICY
        )
    first = sites.attention[0]
    inside = between([nodes[first.residual_in]], [nodes[first.query]])
    linear = next((node for node in inside if node.target in LINEAR), None)
    if linear is None:
        raise UnsupportedModelError(
            f"{first.path}: expected a linear projection of the queries, found none", code=Reason.POLICY
        )
    source = linear.args[0]
    assert isinstance(source, fx.Node)
    return strip_reshapes(source)
