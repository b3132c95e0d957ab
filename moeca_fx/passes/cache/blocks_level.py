"""The blocks level: a stretch of blocks does not run; what it adds to the token stream is forecast.

    x1 = block_1(x0) ... xn = block_n(...)     -->     xn = x0 + forecast(clock, cache_blocks_residual, ...)

Without `residual` the stream after the stretch is forecast itself (DuCa's aggressive step).
"""

import torch
from torch import fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.blocks import Block, blocks_of, check_one_stream
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.state import StateSpec, with_older
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.level import Level, nodes_by_name
from moeca_fx.policies.rules import BlocksRule
from moeca_fx.reasons import Reason

SITE = "blocks"


class BlocksLevel(Level):
    """A blocks rule on one model."""

    def __init__(self, module: fx.GraphModule, sites: Sites, rule: BlocksRule) -> None:
        check_one_stream(sites, "skipping blocks")
        self.rule = rule
        self.terms = rule.predictor.terms
        blocks = blocks_of(sites)
        skipped = _stretch(blocks, rule)
        inside = {site.path for block in skipped for site in block.sites}
        self.start, self.end = skipped[0].sites[0].residual_in, skipped[-1].sites[-1].residual_out
        self.actions = tuple((site.path, "skipped" if site.path in inside else "full") for site in sites.ordered)
        value = example_value(nodes_by_name(module)[self.end])
        self.name = f"{SITE}.{'residual' if rule.residual else 'stream'}"
        shape = tuple(int(size) for size in value.shape[1:])
        kind = self.name.rpartition(".")[2]
        self.states = with_older(StateSpec(SITE, kind, shape, value.dtype, vector=True), self.terms)

    def store(self, step: StepBuilder) -> None:
        """What the stretch added, or the stream after it."""
        value = step.nodes[self.end]
        if self.rule.residual:
            value = step.emit(torch.sub, value, step.nodes[self.start], name=f"new_{self.name}".replace(".", "_"))
        step.store(self.name, value)

    def rewrite(self, step: StepBuilder) -> None:
        """Cut the stretch out."""
        end, forecast = step.nodes[self.end], step.reused(self.name)
        if self.rule.residual:
            forecast = step.emit(torch.add, step.nodes[self.start], forecast, name=f"skipped_{SITE}")
        step.replace(end, forecast)
        step.keep(self.name)

    def follow(self, step: StepBuilder) -> None:
        """A held value is replaced by what another rule's step computes; a history is of full steps only."""
        if self.terms == 1:
            self.store(step)


def _stretch(blocks: tuple[Block, ...], rule: BlocksRule) -> tuple[Block, ...]:
    skipped = blocks[rule.first : len(blocks) - rule.last]
    if not skipped:
        raise UnsupportedModelError(
            f"skipping blocks: expected more than first={rule.first} plus last={rule.last} blocks, found "
            f"{len(blocks)}; lower them",
            code=Reason.POLICY,
        )
    return skipped
