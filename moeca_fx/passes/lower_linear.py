"""lower_linear: send the dense linears of a CPU graph to what is fastest there, found by measuring (`ops.cpu_gemm`).

    y = aten.linear(x, W, b)   -->   y = moeca.linear(x, W, b, 32)         fp32: from 32 rows on, oneDNN
                               -->   y = aten.linear(x, W) + b             fp32 tokens [B, T, K], else
                               -->   y = moeca_cpu.linear(x, W, b)         bf16: fp32 products of widened panels

The default library would write the bias to every row before it multiplies; as a sum of its own it fuses with what
follows. Nothing is changed on other devices and in other dtypes, nor in bf16 where the default is as fast. In fp32, row
programs keep the default: their row count differs at every call, and oneDNN compiles a kernel for every new shape.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value
from moeca_fx.graph.slicing import LINEAR
from moeca_fx.ops.cpu_gemm import onednn_from_rows, widening_is_faster
from moeca_fx.ops.linear import linear

aten = torch.ops.aten


def lower_linear(module: fx.GraphModule) -> int:
    """Lower every linear of the graph, in place; returns how many were lowered."""
    count = _lower(module, torch.float32)
    for part in (module, *(child for child in module.children() if isinstance(child, fx.GraphModule))):
        count += _lower(part, torch.bfloat16)
    return count


def _lower(module: fx.GraphModule, dtype: torch.dtype) -> int:
    found = [node for node in module.graph.nodes if node.target in LINEAR and _is_on_cpu(node, dtype)]
    if not found:
        return 0
    target: Any
    extra: tuple[Any, ...]
    if dtype == torch.float32:
        rows = onednn_from_rows()
        if rows is None:
            return _split_biases(module, found)
        target, extra = linear._opoverload, (rows,)
    else:
        if not widening_is_faster():
            return 0
        target, extra = torch.ops.moeca_cpu.linear.default, ()
    for node in found:
        x, weight, *rest = node.args
        node.target = target
        node.args = (x, weight, rest[0] if rest else None, *extra)
    module.graph.lint()
    module.recompile()
    return len(found)


def _split_biases(module: fx.GraphModule, linears: list[fx.Node]) -> int:
    """Add the bias of every linear of tokens in a call of its own."""
    biased = [node for node in linears if len(node.args) == 3 and node.args[2] is not None]
    found = [node for node in biased if example_value(node).dim() == 3]
    for node in found:
        bias = node.args[2]
        with module.graph.inserting_after(node):
            total = call(module.graph, aten.add.Tensor, node, bias, name=f"{node.name}_biased", like=node)
        node.replace_all_uses_with(total)
        total.args = (node, bias)  # not itself
        node.args = node.args[:2]
    module.graph.lint()
    module.recompile()
    return len(found)


def _is_on_cpu(node: fx.Node, dtype: torch.dtype) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype == dtype
