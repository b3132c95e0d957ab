"""lower_linear: send the dense linears of a CPU graph to what is fastest there, found by measuring (`ops.cpu_gemm`).

    y = aten.linear(x, W, b)   -->   y = moeca_cpu.chosen_linear(x, W, b, 64, 128)     fp32: the own kernel up to 64
                                                                                       rows, oneDNN from 128 on
                               -->   y = aten.linear(x, W)                             fp32, else
                               -->   y = mul(x, W.flatten()) + b                       fp32, of one input
                               -->   y = moeca_cpu.linear(x, W, b)                     bf16: fp32 products of widened
                                                                                       panels

The limits depend on whether the weight is small: libraries have packed such a weight before many rows are gathered.
The default library would write the bias to every row before it multiplies; as a sum of its own, + b, it fuses with what
follows: so it goes with fp32 tokens [B, T, K] and rows [R, K]. Nothing is changed on other devices and in other dtypes,
nor in bf16 where the default is as fast. Row programs do without oneDNN: their row count differs at every call, and
oneDNN compiles a kernel for every new shape.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, evaluate, example_value, is_on_cpu, programs_of
from moeca_fx.graph.slicing import LINEAR
from moeca_fx.ops.cpu_gemm import fastest_linear, widening_is_faster

aten = torch.ops.aten


def lower_linear(module: fx.GraphModule) -> int:
    """Lower every linear of the graph, in place; returns how many were lowered."""
    programs = programs_of(module)
    count = 0
    for part in (module, *programs):
        count += _lower_fp32(part, _linears(part, torch.float32), rows_vary=part is not module)
        count += _lower_widened(part, _linears(part, torch.bfloat16))
    return count


def _linears(module: fx.GraphModule, dtype: torch.dtype) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target in LINEAR and is_on_cpu(node, dtype)]


def _lower_fp32(module: fx.GraphModule, linears: list[fx.Node], *, rows_vary: bool) -> int:
    """The fastest by the size of the weight and the number of rows, and biases apart."""
    split = _split_biases(module, [node for node in linears if rows_vary or example_value(node).dim() == 3])
    chosen, products = {}, 0
    for node in linears:
        if _inputs(node) == 1:
            _multiply(module.graph, node)
            products += 1
            continue
        fastest = fastest_linear(_weight_values(module, node), rows_vary=rows_vary)
        if not fastest.never(_fewest_rows(node)):
            chosen[node] = (fastest.own_up_to, fastest.onednn_from)
    target = torch.ops.moeca_cpu.chosen_linear.default if chosen else None
    return max(split, _retarget(module, target, chosen) + products)


def _inputs(node: fx.Node) -> int:
    """Values of a row of a linear; 0 where nothing tells."""
    assert isinstance(node.args[0], fx.Node), "a linear's rows are a node"
    value = example_value(node.args[0])
    return int(value.shape[-1]) if isinstance(value, torch.Tensor) else 0


def _multiply(graph: fx.Graph, node: fx.Node) -> None:
    """A linear of one input as the product that it is, which fuses with what follows."""
    x, weight, *rest = node.args
    with graph.inserting_before(node):
        factor = call(graph, aten.reshape.default, weight, [-1], name=f"{node.name}_factor")
        if isinstance(weight, fx.Node) and isinstance(example_value(weight), torch.Tensor):
            factor.meta["val"] = example_value(weight).reshape(-1)
        made = call(graph, aten.mul.Tensor, x, factor, name=f"{node.name}_product", like=node)
        if rest and rest[0] is not None:
            made = call(graph, aten.add.Tensor, made, rest[0], name=f"{node.name}_sum", like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _weight_values(module: fx.GraphModule, node: fx.Node) -> int:
    """Outputs times inputs of a linear."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node), "a linear's weight is a node"
    value = example_value(weight)
    return int((evaluate(module, weight) if value is None else value).numel())


def _fewest_rows(node: fx.Node) -> int:
    """Rows of a linear where the batch is one sample: tokens [B, T, K] have T at least."""
    shape = example_value(node).shape
    return shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 1


def _lower_widened(module: fx.GraphModule, linears: list[fx.Node]) -> int:
    """bf16: fp32 products where there are no fast ones."""
    if not linears or not widening_is_faster():
        return 0
    return _retarget(module, torch.ops.moeca_cpu.linear.default, dict.fromkeys(linears, ()))


def _retarget(module: fx.GraphModule, target: Any, linears: dict[fx.Node, tuple[Any, ...]]) -> int:
    """Have `target` compute each linear, with further arguments of its own."""
    for node, extra in linears.items():
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
