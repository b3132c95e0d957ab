"""lower_linear: send the dense linears of a CPU graph to what is fastest there, found by measuring (`ops.cpu_gemm`).

    y = aten.linear(x, W, b)   -->   y = moeca_cpu.onednn_linear(x, W, None, 32) + b     fp32: from 32 rows on, oneDNN
                               -->   y = aten.linear(x, W) + b             fp32 tokens [B, T, K] and rows [R, K], else
                               -->   y = moeca_cpu.linear(x, W, b)         bf16: fp32 products of widened panels

The default library would write the bias to every row before it multiplies; as a sum of its own it fuses with what
follows. Nothing is changed on other devices and in other dtypes, nor in bf16 where the default is as fast. In fp32, row
programs keep the default product: their row count differs at every call, and oneDNN compiles a kernel for every new
shape. Their biases are split too.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value, is_on_cpu, programs_of
from moeca_fx.graph.slicing import LINEAR
from moeca_fx.ops.cpu_gemm import onednn_from_rows, widening_is_faster

aten = torch.ops.aten


def lower_linear(module: fx.GraphModule) -> int:
    """Lower every linear of the graph, in place; returns how many were lowered."""
    programs = programs_of(module)
    count = sum(_split_biases(part, _linears(part, torch.float32)) for part in programs)
    count += _lower_tokens(module, _linears(module, torch.float32))
    for part in (module, *programs):
        count += _lower_widened(part, _linears(part, torch.bfloat16))
    return count


def _linears(module: fx.GraphModule, dtype: torch.dtype) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target in LINEAR and is_on_cpu(node, dtype)]


def _lower_tokens(module: fx.GraphModule, linears: list[fx.Node]) -> int:
    """fp32, of whole samples: oneDNN where it is faster."""
    rows = onednn_from_rows() if linears else None
    split = _split_biases(module, [node for node in linears if example_value(node).dim() == 3])
    if rows is None:
        return split
    return _retarget(module, linears, torch.ops.moeca_cpu.onednn_linear.default, rows)


def _lower_widened(module: fx.GraphModule, linears: list[fx.Node]) -> int:
    """bf16: fp32 products where there are no fast ones."""
    if not linears or not widening_is_faster():
        return 0
    return _retarget(module, linears, torch.ops.moeca_cpu.linear.default)


def _retarget(module: fx.GraphModule, linears: list[fx.Node], target: Any, *extra: Any) -> int:
    for node in linears:
        x, weight, *rest = node.args
        node.target = target
        node.args = (x, weight, rest[0] if rest else None, *extra)
    module.graph.lint()
    module.recompile()
    return len(linears)


def _split_biases(module: fx.GraphModule, linears: list[fx.Node]) -> int:
    """Add the bias of each linear in a call of its own."""
    found = [node for node in linears if len(node.args) == 3 and node.args[2] is not None]
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
