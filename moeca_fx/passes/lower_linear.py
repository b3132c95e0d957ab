"""lower_linear: send the dense linears of a CPU graph to what is fastest there, found by measuring (`ops.cpu_gemm`).

    y = aten.linear(x, W, b)   -->   y = moeca.linear(x, W, b, 32)         fp32: from 32 rows on, oneDNN
                               -->   y = moeca_cpu.linear(x, W, b)         bf16: fp32 products of widened panels

Nothing is changed where the default library is as fast, on other devices or in other dtypes. In fp32, row programs keep
the default: their row count differs at every call, and oneDNN compiles a kernel for every new shape.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.slicing import LINEAR
from moeca_fx.ops.cpu_gemm import onednn_from_rows, widening_is_faster
from moeca_fx.ops.linear import linear


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
            return 0
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


def _is_on_cpu(node: fx.Node, dtype: torch.dtype) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype == dtype
