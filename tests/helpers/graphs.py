"""Export small modules over a token stream [B, T, H] into graphs, batch left open, the way capture does."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

BATCH, TOKENS, WIDTH = 3, 5, 8


def stream(batch: int = BATCH, seed: int = 0) -> Tensor:
    """Token stream [B, TOKENS, WIDTH]."""
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def exported(module: nn.Module, *inputs: Tensor, decompose: bool = True) -> fx.GraphModule:
    """Graph of `module`, its output a tuple; dimension 0 of inputs that have the batch size is open.

    `decompose` is what capture does; without it, higher-order calls and dropout stay in the graph.
    """
    batch = inputs[0].shape[0]
    dynamic = tuple({0: torch.export.Dim.AUTO} if x.dim() and x.shape[0] == batch else {} for x in inputs)
    shapes = (dynamic,) if isinstance(module, Compute) else dynamic
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False)
    graph = (program.run_decompositions({}) if decompose else program).module(check_guards=False)
    graph.graph.set_codegen(fx.graph.CodeGen())
    graph._forward_pre_hooks.clear()
    output = graph.graph.output_node()
    result = output.args[0]
    output.args = (tuple(result) if isinstance(result, (list, tuple)) else (result,),)
    graph.recompile()
    return graph


def placeholder(graph: fx.GraphModule, index: int = 0) -> fx.Node:
    """An input node."""
    return graph.graph.find_nodes(op="placeholder")[index]


def outputs(graph: fx.GraphModule) -> list[fx.Node]:
    """The output nodes."""
    results = graph.graph.output_node().args[0]
    assert isinstance(results, tuple)
    return [node for node in results if isinstance(node, fx.Node)]


class Compute(nn.Module):
    """A module around a function of tensors; parameters are given by keyword and passed by keyword."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], **parameters: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)
        self.names = tuple(parameters)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor | tuple[Tensor, ...] = self.function(*inputs, **{name: getattr(self, name) for name in self.names})
        return out
