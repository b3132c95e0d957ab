"""Recognise the common form of an expert: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate.

    rows -> grouped_linear(gate) -> silu -+
                                          mul -> grouped_linear(down)      =  GatedForm(gate, up, down, "silu")
    rows -> grouped_linear(up) -----------+

Fused kernels take this form; every other expert keeps its own program.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from moeca_fx.graph.rewrite import evaluate
from moeca_fx.ops.grouped_linear import grouped_linear

aten = torch.ops.aten
_GROUPED = grouped_linear._opoverload
ACTIVATIONS: tuple[Literal["silu", "gelu", "gelu_tanh", "relu"], ...] = ("silu", "gelu", "gelu_tanh", "relu")
"""In the order of the kernels' numbering."""


@dataclass(frozen=True)
class GatedForm:
    """Stacked weights of an expert program, as paths of tensors below the program's module.

    Attributes:
        gate, gate_bias: None without a gate.
        up, up_bias, down, down_bias: weights [E, out, in]; biases [E, out] or None.
        activation: position in `ACTIVATIONS`.
    """

    gate: str | None
    gate_bias: str | None
    up: str
    up_bias: str | None
    down: str
    down_bias: str | None
    activation: int

    def names(self) -> tuple[str | None, ...]:
        """Tensors in the order in which kernels take them."""
        return (self.gate, self.gate_bias, self.up, self.up_bias, self.down, self.down_bias)


def gated_form(program: fx.GraphModule) -> GatedForm | str:
    """The form of an expert program, or why it has none.

    Views of stacked weights become buffers of the program (they copy nothing).
    """
    rows = program.graph.find_nodes(op="placeholder")[0]
    down = program.graph.output_node().args[0]
    if not isinstance(down, fx.Node) or down.target is not _GROUPED:
        return "it does not end in a linear layer"
    hidden = down.args[0]
    assert isinstance(hidden, fx.Node)
    if len(hidden.users) != 1:
        return "its hidden value has several readers"
    gate = up = None
    if hidden.target is aten.mul.Tensor:
        pairs = (hidden.args, hidden.args[::-1])
        found = next(((a, b) for a, b in pairs if _activation(a) is not None and _reads(b, rows)), None)
        if found is None:
            return "its product is not of an activated and a plain linear layer"
        active, up = found
        gate = active.args[0]  # type: ignore[union-attr]  # an activation is a node
    else:
        active = hidden
        up = hidden.args[0] if _activation(hidden) is not None else None
    kind = _activation(active)
    if kind is None or not _reads(up, rows) or (gate is not None and not _reads(gate, rows)):
        return "its hidden value is no activation of a linear layer of the rows"
    tensors = [_tensor(program, node, index) for node in (gate, up, down) for index in (1, 2)]
    return GatedForm(*tensors, kind)  # type: ignore[call-arg, arg-type]  # six; up and down have a weight


def _activation(node: Any) -> int | None:
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.silu.default:
        return ACTIVATIONS.index("silu")
    if node.target is aten.relu.default:
        return ACTIVATIONS.index("relu")
    if node.target is aten.gelu.default:
        return ACTIVATIONS.index("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    return None


def _reads(node: Any, rows: fx.Node) -> bool:
    return isinstance(node, fx.Node) and node.target is _GROUPED and node.args[0] is rows and len(node.users) == 1


def _tensor(program: fx.GraphModule, linear: Any, index: int) -> str | None:
    """Path of an operand of a grouped linear below the program."""
    node = linear.args[index] if linear is not None else None
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return str(node.target)
    name = f"view_{node.name}"
    if not hasattr(program, name):
        program.register_buffer(name, evaluate(program, node), persistent=False)
    return name
