"""lower_linear: send the dense fp32 linears of a CPU graph to the library that is faster there.

    y = aten.linear(x, W, b)   -->   y = moeca.linear(x, W, b, 32)        from 32 rows on, oneDNN

Nothing is changed where the default library is as fast (measured by `ops.cpu_gemm`), on other devices or in other
dtypes. Row and expert programs keep the default: their row count differs at every call, and oneDNN compiles a kernel
for every new shape, which costs more than it saves.
"""

import torch
from torch import fx

from moeca_fx.graph.rewrite import example_value
from moeca_fx.graph.slicing import LINEAR
from moeca_fx.ops.cpu_gemm import onednn_from_rows
from moeca_fx.ops.linear import linear


def lower_linear(module: fx.GraphModule) -> int:
    """Lower every linear of the graph, in place; returns how many were lowered."""
    found = [node for node in module.graph.nodes if node.target in LINEAR and _is_cpu_fp32(node)]
    rows = onednn_from_rows() if found else None
    if rows is None:
        return 0
    for node in found:
        x, weight, *rest = node.args
        node.target = linear._opoverload
        node.args = (x, weight, rest[0] if rest else None, rows)
    module.graph.lint()
    module.recompile()
    return len(found)


def _is_cpu_fp32(node: fx.Node) -> bool:
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dtype == torch.float32
