"""The output level: a step is the forecast of the model's output; nothing in the network runs.

velocity = graph(x, t, y)     -->     velocity = forecast(clock, cache_output_value, cache_output_value_1, ...)
"""

from typing import Any

import torch
from torch import Tensor, fx

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.sites import Sites
from moeca_fx.graph.state import StateSpec, with_older
from moeca_fx.ops import forecast
from moeca_fx.passes.cache.builder import StepBuilder
from moeca_fx.passes.cache.level import Level, actions_of
from moeca_fx.policies.rules import OutputRule
from moeca_fx.reasons import Reason

SITE = "output"


class OutputLevel(Level):
    """An output rule on one model."""

    def __init__(self, module: fx.GraphModule, sites: Sites, rule: OutputRule) -> None:
        self.rule = rule
        self.terms = rule.history
        self.actions = actions_of(sites, "skipped")
        self.outputs = _outputs(module)
        states = [_state(node, f"value{index or ''}") for index, node in enumerate(self.outputs)]
        self.input: str | None = None
        if rule.inputs:
            found = _matching_input(module, self.outputs[0])
            self.input = found.name
            states.append(_state(found, "input"))
        self.states = tuple(older for state in states for older in with_older(state, self.terms))

    def store(self, step: StepBuilder) -> None:
        """The outputs, and a copy of the input: the caller may write into its own."""
        for index, node in enumerate(_output_nodes(step.module)):
            step.store(f"{SITE}.value{index or ''}", node)
        if self.input is not None:
            step.store(f"{SITE}.input", step.emit(torch.clone, step.nodes[self.input], name="new_output_input"))

    def rewrite(self, step: StepBuilder) -> None:
        """Return forecasts."""
        output = step.graph.output_node()
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]  # capture flattens the output to a tuple
        for index, node in enumerate(_output_nodes(step.module)):
            state = f"{SITE}.value{index or ''}"
            value = self._with_inputs(step, state) if self.input is not None else self._without(step, state)
            results[results.index(node)] = value
            step.keep(state)
        if self.input is not None:
            step.keep(f"{SITE}.input")
        output.args = (tuple(results),)

    def _without(self, step: StepBuilder, state: str) -> fx.Node:
        value = step.reused(state)
        # A held value is handed out as a copy: the caller may write into its own.
        return step.emit(torch.clone, value, name="held_output") if self.terms == 1 else value

    def _with_inputs(self, step: StepBuilder, state: str) -> fx.Node:
        assert self.input is not None
        inputs = (step.nodes[self.input], *step.kept(f"{SITE}.input"))
        channels = int(example_value(self.outputs[0]).shape[1])
        if int(example_value(inputs[0]).shape[1]) < channels:
            inputs = tuple(step.emit(forecast.widen, value, channels, name=f"wide_{value.name}") for value in inputs)
        values = (*step.kept(state), *inputs)
        assert step.clock is not None, "a forecast reads the clock"
        return step.emit(forecast.forecast, step.clock, *values, name="forecast_output")


def _output_nodes(module: fx.GraphModule) -> list[fx.Node]:
    results = module.graph.output_node().args[0]
    assert isinstance(results, tuple), "capture flattens the output to a tuple"
    return [node for node in results if isinstance(node, fx.Node) and isinstance(example_value(node), Tensor)]


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    nodes = _output_nodes(module)
    if not nodes or not all(example_value(node).is_floating_point() for node in nodes):
        raise UnsupportedModelError(
            f"the model's result: expected floating-point tensors to forecast, found {[node.name for node in nodes]}; "
            "choose a policy at the sublayer or branch level",
            code=Reason.POLICY,
        )
    return nodes


def _state(node: fx.Node, kind: str) -> StateSpec:
    value = example_value(node)
    return StateSpec(SITE, kind, tuple(int(size) for size in value.shape[1:]), value.dtype, vector=True)


def _matching_input(module: fx.GraphModule, output: fx.Node) -> fx.Node:
    """The input that the output moves: shaped like it, at most with fewer channels (learned variances come after)."""
    wanted = example_value(output)
    inputs: list[fx.Node] = module.graph.find_nodes(op="placeholder")
    for node in inputs:
        value = example_value(node)
        if not isinstance(value, Tensor) or value.dim() != wanted.dim() or value.dtype != wanted.dtype:
            continue
        same = value.dim() > 1 and value.shape[0] == wanted.shape[0] and value.shape[2:] == wanted.shape[2:]
        if same and value.shape[1] <= wanted.shape[1]:
            return node
    raise UnsupportedModelError(
        f"a forecast over the model's input: expected an input of the output's shape {tuple(wanted.shape)}, at most "
        "with fewer channels, found none; calibrate with inputs=False",
        code=Reason.POLICY,
    )
