"""The sublayer level: outputs of attention, feed-forwards and MoE layers before their gates are forecast.

    x1 = x + gate * attn(x)                    x1 = x + gate * forecast(clock, cache_attn, ...)
    x2 = x1 + gate * mlp(x1)          -->      x2 = x1 + gate * forecast(clock, cache_ffn, ...)     no row selected, or
                                               f  = forecast(...), rows of mask from x1             mask = selector(...)

Gates and modulation are always the current step's.
"""

from dataclasses import dataclass

import torch
from torch import fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.blocks import blocks_of
from moeca_fx.graph.layout import STREAM
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.row_program import RowProgram, build_row_program
from moeca_fx.graph.sites import AttentionSite, MoESite, Site, Sites
from moeca_fx.graph.state import StateSpec, with_older
from moeca_fx.ops import forecast, rows, token_signals
from moeca_fx.passes.cache.branch_level import refresh_dense_ffn
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.level import Level, nodes_by_name
from moeca_fx.passes.cache.moe_rows import MoERowPrograms, build_moe_row_programs, refresh_moe
from moeca_fx.policies.rules import SublayerRule
from moeca_fx.policies.selector import Place, TokenSelector
from moeca_fx.reasons import Reason

KINDS = {"AttentionSite": "attn", "DenseFFNSite": "ffn", "MoESite": "moe"}


@dataclass(frozen=True)
class _Sublayer:
    """One site: its state's name, and where it stands; `received` is the attention site whose map scores its tokens."""

    site: Site
    state: str
    place: Place
    received: AttentionSite | None


class SublayerLevel(Level):
    """A sublayer rule on one model."""

    def __init__(self, module: fx.GraphModule, sites: Sites, rule: SublayerRule) -> None:
        self.rule = rule
        self.terms = rule.predictor.terms
        blocks = blocks_of(sites)
        self.sublayers = [
            _Sublayer(
                site,
                f"{site.path}.{KINDS[type(site).__name__]}",
                Place(index, len(blocks), site.tokens),
                block.attention_before(site),
            )
            for index, block in enumerate(blocks)
            for site in block.sites
            if not (isinstance(site, AttentionSite) and rule.attention == "full")
        ]
        _check_rows(sites, rule)
        nodes = nodes_by_name(module)
        self.states = tuple(state for sublayer in self.sublayers for state in self._states(sublayer, nodes))
        done = {sublayer.site.path: self._action(sublayer) for sublayer in self.sublayers}
        self.actions = tuple((site.path, done.get(site.path, "full")) for site in sites.ordered)

    @property
    def store_reads_clock(self) -> bool:
        """To measure what the forecast of every row missed."""
        return self._wants("error")

    def _wants(self, signal: str) -> bool:
        return self.rule.selector is not None and signal in self.rule.selector.signals

    def _action(self, sublayer: _Sublayer) -> str:
        return "reuse" if self._selector(sublayer) is None else "rows"

    def _selector(self, sublayer: _Sublayer) -> TokenSelector | None:
        return None if isinstance(sublayer.site, AttentionSite) else self.rule.selector

    def _states(self, sublayer: _Sublayer, nodes: dict[str, fx.Node]) -> list[StateSpec]:
        site, value = sublayer.site, example_value(nodes[sublayer.site.output])
        shape = tuple(int(size) for size in value.shape[1:])
        selector = self._selector(sublayer)
        ranks = selector is not None and "error" in selector.signals
        held = StateSpec(site.path, sublayer.state.rpartition(".")[2], shape, value.dtype, vector=True)
        states = list(with_older(held, self.terms, all_carried=ranks))
        if selector is not None:
            selector.arguments(sublayer.place)  # refuses a model that lacks what it needs
            for signal in selector.signals:
                states.append(StateSpec(site.path, signal, (site.tokens,), torch.float32))
        return states

    # -- full step ----------------------------------------------------------------------------------------------

    def store(self, step: StepBuilder) -> None:
        """Every output, and the signals that the selector ranks tokens by."""
        for sublayer in self.sublayers:
            site, base = sublayer.site, sublayer.state.replace(".", "_")
            output = step.emit(rows.tokens_first, step.nodes[site.output], 0, 1, site.tokens, name=f"new_{base}")
            selector = self._selector(sublayer)
            for signal in selector.signals if selector is not None else ():
                name = f"{site.path}.{signal}"
                step.updated[name] = self._signal(step, sublayer, signal, output)
            step.store(sublayer.state, output)

    def _signal(self, step: StepBuilder, sublayer: _Sublayer, signal: str, output: fx.Node) -> fx.Node:
        name = f"new_{sublayer.site.path}_{signal}".replace(".", "_")
        if signal == "age":
            return step.emit(token_signals.zero_age, output, name=name)
        if signal == "error":
            return step.emit(forecast.forecast_error, step.clock, output, *step.kept(sublayer.state), name=name)
        attention = sublayer.received
        if attention is None:
            return step.emit(token_signals.zero_age, output, name=name)  # no attention before it: all tokens alike
        core = step.nodes[attention.core]
        query, key = step.nodes[attention.query], step.nodes[attention.key]
        received = step.emit(token_signals.received_attention, query, key, core.kwargs.get("scale"), name=name)
        if not attention.joint:
            return received
        return step.emit(torch.narrow, received, 1, attention.first_token, attention.tokens, name=f"{name}_of_stream")

    # -- this rule's step ---------------------------------------------------------------------------------------

    def rewrite(self, step: StepBuilder) -> None:
        """Replace every output, in network order; programs are built before the first edit."""
        programs = {s.site.path: self._program(step, s) for s in self.sublayers if self._selector(s) is not None}
        for sublayer in self.sublayers:
            site = sublayer.site
            if self._selector(sublayer) is None:
                step.keep(sublayer.state)
                output = step.reused(sublayer.state)
            else:
                output = self._refresh(step, sublayer, programs[site.path])
            step.replace(step.nodes[site.output], output)

    def _program(self, step: StepBuilder, sublayer: _Sublayer) -> RowProgram | MoERowPrograms:
        site = sublayer.site
        if isinstance(site, MoESite):
            return build_moe_row_programs(step.module, step.nodes, site)
        stream, output = step.nodes[site.residual_in], step.nodes[site.output]
        return build_row_program(step.module, {stream: STREAM}, [output], site.tokens)

    def _refresh(self, step: StepBuilder, sublayer: _Sublayer, program: RowProgram | MoERowPrograms) -> fx.Node:
        site = sublayer.site
        mask = self._select(step, sublayer)
        if isinstance(site, MoESite):
            assert isinstance(program, MoERowPrograms)
            return refresh_moe(step, site, sublayer.state, mask, program)
        assert isinstance(program, RowProgram) and not isinstance(site, AttentionSite)
        return refresh_dense_ffn(step, site, sublayer.state, mask, program)

    def _select(self, step: StepBuilder, sublayer: _Sublayer) -> fx.Node:
        selector, path = self._selector(sublayer), sublayer.site.path
        assert selector is not None and step.clock is not None
        base = path.replace(".", "_")
        signals = {signal: step.cache[f"{path}.{signal}"] for signal in selector.signals}
        clock = step.emit(token_signals.rest_of_clock, step.clock, self.terms, name=f"{base}_numbers")
        arguments = (*signals.values(), clock, *selector.arguments(sublayer.place))
        mask = step.emit(selector.function, *arguments, name=f"{base}_selected")
        for signal in selector.signals:
            step.updated[f"{path}.{signal}"] = signals[signal]
        if "age" in signals:
            name = f"new_{base}_age"
            step.updated[f"{path}.age"] = step.emit(token_signals.age_after, signals["age"], mask, name=name)
        return mask


def _check_rows(sites: Sites, rule: SublayerRule) -> None:
    """A rule that computes single token rows needs a router that routes each token alone.

    Raises:
        UnsupportedModelError: a MoE site whose experts choose among all tokens.
    """
    for site in sites.moe:
        if rule.selector is not None and site.layout == "expert":
            raise UnsupportedModelError(
                f"{site.path}: its experts choose among all tokens of a sample, so one token cannot be routed alone; "
                f"expected a rule without a token selector, found {type(rule.selector).__name__}; use MoECa or another "
                "branch rule, or hold or forecast whole sublayers (FORA, TaylorSeer)",
                code=Reason.POLICY,
            )
