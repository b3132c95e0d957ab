"""pack_stream: one copy where a token stream begins transposed, none where it does not."""

import torch
from torch import fx

from moeca_fx.graph.sites import Sites
from moeca_fx.passes.pack_stream import pack_stream
from tests.helpers import zoo_models
from tests.helpers.compiled import vectorized
from tests.helpers.passes import check_pass
from tests.helpers.toys import toy, toy_inputs

clone = torch.ops.aten.clone.default


class _Pack:
    """The pass on a copy; a second run starts from the sites of the first."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites

    def __call__(self, module: fx.GraphModule) -> None:
        self.sites = pack_stream(module, self.sites)


def test_a_transposed_stream_is_copied_once() -> None:
    made = vectorized(zoo_models.tiny("dsmoe"), zoo_models.inputs(2))
    pack = _Pack(made.sites)
    with torch.no_grad():
        examples = [zoo_models.inputs(batch, seed=batch) for batch in (2, 5)]
        after = check_pass(made.module, pack, examples, {clone: (1, 2)})  # one is the unpatchify's own
    (copy,) = (node for node in after.graph.nodes if node.name.endswith("_packed"))
    readers = [site.path for site in pack.sites.ordered if site.residual_in == copy.name]
    assert readers == [made.sites.ordered[0].path]
    before = made.sites.ordered[0].residual_in
    assert [user.name for user in next(n for n in after.graph.nodes if n.name == before).users] == [copy.name]


def test_a_stream_in_order_is_left() -> None:
    made = vectorized(toy(), toy_inputs())
    with torch.no_grad():
        check_pass(made.module, _Pack(made.sites), [toy_inputs(seed=1)], {clone: (0, 0)})


def test_a_graph_without_sites_is_left() -> None:
    made = vectorized(toy(), toy_inputs())
    assert pack_stream(made.module, Sites(())) == Sites(())
