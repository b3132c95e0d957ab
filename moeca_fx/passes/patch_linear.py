"""patch_linear: a convolution whose patches neither overlap nor leave gaps is a linear of patches.

    y = conv2d(x, W, b, stride=kernel)   -->   patches = reshape(permute(view(x, B, C, h, p, w, q)), B, h*w, C*p*q)
                                               tokens  = linear(patches, view(W, O, C*p*q), b)
                                               y       = view(permute(tokens), B, O, h, w)

On a CPU only: there a library's set-up for a convolution costs more than the product itself.
"""

from typing import Any

import torch
from torch import fx

from moeca_fx.graph.rewrite import call, example_value

aten = torch.ops.aten
_DEFAULTS: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]  # bias, stride, padding, dilation, groups


def patch_linear(module: fx.GraphModule) -> int:
    """Rewrite every such convolution of the graph, in place; returns how many."""
    found = [node for node in module.graph.nodes if node.target is aten.conv2d.default and _is_of_patches(node)]
    for node in found:
        _rewrite(module, node)
    if found:
        module.graph.lint()
        module.recompile()
    return len(found)


def _is_of_patches(node: fx.Node) -> bool:
    given = list(node.args)
    x, weight, _bias, stride, padding, dilation, groups = given + _DEFAULTS[len(given) - 2 :]
    if node.kwargs or not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return False
    image, kernel = example_value(x), example_value(weight)
    if image.device.type != "cpu" or image.dim() != 4 or any(not isinstance(size, int) for size in image.shape[1:]):
        return False
    sizes = tuple(kernel.shape[2:])
    whole = all(size % patch == 0 for size, patch in zip(image.shape[2:], sizes, strict=True))
    return whole and _pair(stride) == sizes and (_pair(padding), _pair(dilation), groups) == ((0, 0), (1, 1), 1)


def _pair(value: Any) -> tuple[int, int]:
    """Of a size that may be given once for both directions."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (values[0], values[-1])


def _rewrite(module: fx.GraphModule, node: fx.Node) -> None:
    x, weight, *rest = node.args
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    (channels, height, width), (outputs, _, p, q) = example_value(x).shape[1:], example_value(weight).shape
    rows, columns, inputs = height // p, width // q, channels * p * q
    graph, name = module.graph, node.name
    with graph.inserting_before(node):
        batch = call(graph, aten.sym_size.int, x, 0, name=f"{name}_batch")
        grid = call(graph, aten.view.default, x, [batch, channels, rows, p, columns, q], name=f"{name}_grid")
        apart = call(graph, aten.permute.default, grid, [0, 2, 4, 1, 3, 5], name=f"{name}_apart")
        patches = call(graph, aten.reshape.default, apart, [batch, rows * columns, inputs], name=f"{name}_patches")
        flat = aten.view if example_value(weight).is_contiguous() else aten.reshape  # torch.channels_last
        matrix = call(graph, flat.default, weight, [outputs, inputs], name=f"{name}_matrix")
        tokens = call(graph, aten.linear.default, patches, matrix, *rest[:1], name=f"{name}_tokens")
        value = example_value(node)
        tokens.meta["val"] = value.flatten(2).transpose(1, 2)
        turned = call(graph, aten.permute.default, tokens, [0, 2, 1], name=f"{name}_turned")
        shape = [batch, outputs, rows, columns]
        made = call(graph, aten.view.default, turned, shape, name=f"{name}_as_linear", like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
