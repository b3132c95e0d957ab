"""normalize: remove what an exported graph holds besides the computation.

    to = wrap_with_autocast(..., submod)       mul = aten.mul(...)           (the body, inlined)
    _assert_tensor_metadata(x, ...)      -->
    slice(x, 1, None, 8)                       slice(x, 1, 0, 8)             (Inductor crashes on a start of None)
    dropout(x, 0.1, False); clone(x)           x
    type_as(x, y)                              x, or _to_copy(x, dtype of y): y's rows are not read

Later passes then match computation only.
"""

import torch
from torch import fx

from moeca_fx.graph.rewrite import attribute, example_value, finish

aten = torch.ops.aten


def normalize(module: fx.GraphModule) -> fx.GraphModule:
    """Apply every rule once, in place; a second run changes nothing."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            module.graph.erase_node(node)
        elif node.op == "call_function":
            _normalize_call(module, node)
    return finish(module, "normalize")


def _normalize_call(module: fx.GraphModule, node: fx.Node) -> None:
    name = str(node.target)
    if "wrap_with_autocast" in name and node.args[2] is False:
        _inline(module, node, node.args[4], node.args[5:])
    elif "wrap_with_set_grad" in name:
        _inline(module, node, node.args[1], node.args[2:])
    elif "_assert_tensor_metadata" in name:
        module.graph.erase_node(node)
    elif node.target is aten.slice.Tensor and len(node.args) > 2 and node.args[2] is None:
        node.args = (*node.args[:2], 0, *node.args[3:])
    elif node.target is aten.type_as.default:
        _cast(node)
    elif _is_identity(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]  # the tensor operand is a node
        module.graph.erase_node(node)


def _cast(node: fx.Node) -> None:
    """A cast to another tensor's type: by the type alone, on the same device."""
    x, result = node.args[0], example_value(node)
    assert isinstance(x, fx.Node), f"{node.name}: what is cast is a node"
    if example_value(x).device != result.device:
        return
    if example_value(x).dtype == result.dtype:
        node.replace_all_uses_with(x)
        node.graph.erase_node(node)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": result.dtype}


def _is_identity(node: fx.Node) -> bool:
    """Dropout that is off, and copies of tensors that nothing writes to."""
    if node.target is aten.dropout.default:
        return node.args[2] is False or bool(node.args[1] == 0.0)
    if node.target is aten.clone.default:
        return "memory_format" not in node.kwargs
    return node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def _inline(module: fx.GraphModule, node: fx.Node, body: object, operands: tuple[object, ...]) -> None:
    """Replace a higher-order call by the nodes of its body."""
    assert isinstance(body, fx.Node), f"{node.name}: the body of a higher-order call is a get_attr node"
    inner = attribute(module, str(body.target))
    environment = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
    result: object = None
    with module.graph.inserting_before(node):
        for step in inner.graph.nodes:
            if step.op == "output":
                result = fx.node.map_arg(step.args[0], environment.__getitem__)
            elif step.op == "get_attr":
                name = f"{node.name}_{str(step.target).replace('.', '_')}"
                setattr(module, name, attribute(inner, str(step.target)))
                environment[step] = module.graph.get_attr(name)
            elif step.op != "placeholder":
                environment[step] = module.graph.node_copy(step, environment.__getitem__)
    for user in list(node.users):
        user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]  # users are getitem nodes
        module.graph.erase_node(user)
    module.graph.erase_node(node)
