"""One graph of an artefact: its named inputs and outputs, and what a step hands back of them."""

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from moeca_fx.errors import ExportError
from moeca_fx.graph.rewrite import call, example_value
from moeca_fx.graph.state import StateSpec

BATCH = "batch"
FORCE = "force"
CLOCK = "clock"
STREAM = "stream"
COUNTERS = "counters"
CACHE_IN, CACHE_OUT = "cache_in.", "cache_out."


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a graph or comes out of it; `BATCH` in its shape stands for the batch's size."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    @property
    def batched(self) -> bool:
        """Whether its first axis is the batch."""
        return self.shape[:1] == (BATCH,)

    def sized(self, batch: int) -> list[int]:
        """Its shape for a batch."""
        return [batch if isinstance(size, str) else size for size in self.shape]

    def empty(self, batch: int, device: torch.device | str) -> Tensor:
        """A buffer for it."""
        return torch.empty(self.sized(batch), dtype=self.dtype, device=device)


@dataclass(frozen=True)
class ExportGraph:
    """A graph ready to be exported.

    Attributes:
        name: of its file, without the ending.
        module: ``(*inputs) -> (*outputs)``, all of them tensors.
        inputs, outputs: in order; examples: of the inputs, for a batch of two.
        returns: what a step hands back (results, all caches, counters): ``("output", position)``,
            ``("input", position)`` for a cache that it leaves as it is or writes in place, or ``("value", value)``.
    """

    name: str
    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    examples: tuple[Tensor, ...]
    returns: tuple[tuple[str, Any], ...]


def tensor_port(name: str, value: Tensor, batched: bool) -> Port:
    """The port of an example, its first axis the batch or not."""
    return Port(name, (BATCH, *value.shape[1:]) if batched else tuple(value.shape), value.dtype)


def cache_port(prefix: str, state: StateSpec) -> Port:
    """Of a cache; `prefix` is `CACHE_IN` or `CACHE_OUT`."""
    return Port(f"{prefix}{state.name}", (BATCH, *state.shape), state.dtype)


def make_graph(
    name: str,
    module: fx.GraphModule,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    examples: Sequence[Tensor],
    in_place: Collection[Any] = (),
) -> ExportGraph:
    """Let a step's graph take and give tensors alone, each of its outputs computed and of its own.

    Args:
        module: edited in place; its inputs are those of `inputs`.
        outputs: one for each of its outputs; those that turn out to be no results of their own are left out.
        in_place: functions that write into their first operands and return those.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    assert len(placeholders) == len(inputs), f"{name}: expected {len(inputs)} inputs, found {placeholders}"
    place = {node: index for index, node in enumerate(placeholders)}
    output = module.graph.output_node()
    values: Any = output.args[0]
    returns: list[tuple[str, Any]] = []
    kept: list[fx.Node] = []
    ports: list[Port] = []
    for port, value in zip(outputs, values, strict=True):
        if not isinstance(value, fx.Node):
            returns.append(("value", value))
            continue
        written = _written(value, in_place)
        if written in place and inputs[place[written]].name.startswith(CACHE_IN):
            returns.append(("input", place[written]))
            continue
        if value.op == "placeholder" or value in kept:
            with module.graph.inserting_before(output):
                value = call(module.graph, torch.clone, value, name=f"{value.name}_copy")
        returns.append(("output", len(kept)))
        kept.append(value)
        ports.append(port)
    output.args = (tuple(kept),)
    module.graph.lint()
    module.recompile()
    return ExportGraph(name, module, tuple(inputs), tuple(ports), tuple(examples), tuple(returns))


def _written(value: fx.Node, in_place: Collection[Any]) -> fx.Node:
    """The node whose memory a node returns: back through functions that write in place and items of their results."""
    while value.op == "call_function":
        source: Any = value
        if value.target in in_place:
            source = value.args[0]
        elif value.target is operator.getitem:
            held, index = value.args
            if isinstance(held, fx.Node) and held.target in in_place:
                source = held.args[index]  # type: ignore[index]  # of a tuple
        if source is value or not isinstance(source, fx.Node):
            return value
        value = source
    return value


def result_ports(module: fx.GraphModule, count: int) -> list[Port]:
    """Of the model's own results, the first `count` outputs of its graph; an open size is the batch's.

    Raises:
        ExportError: the batch is not in front.
    """
    values: Any = module.graph.output_node().args[0]
    tensors = sum(isinstance(value, fx.Node) for value in values[:count])
    ports: list[Port] = []
    for index, node in enumerate(values[:count]):
        name = f"result.{index}" if tensors > 1 else "result"
        if not isinstance(node, fx.Node):
            ports.append(Port(name, (), torch.float32))
            continue
        value = example_value(node)
        shape = tuple(size if isinstance(size, int) else BATCH for size in value.shape)
        if BATCH in shape[1:]:
            raise ExportError(
                f"export: {name} has the batch in the shape {list(value.shape)}, expected it in front alone"
            )
        ports.append(Port(name, shape, value.dtype))
    return ports
