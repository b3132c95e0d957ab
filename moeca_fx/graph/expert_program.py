"""Expert programs: the graph of one expert, rebuilt over the stacked weights of all experts.

    forward(rows)                                forward(rows, row_expert, offsets)
      gate = linear(rows, gate_proj.weight)        gate = moeca.grouped_linear(rows, gate_proj [E, I, H], None, offsets)
      up   = linear(rows, up_proj.weight)   -->    up   = moeca.grouped_linear(rows, up_proj [E, I, H], None, offsets)
      down = linear(silu(gate) * up, ..)           down = moeca.grouped_linear(silu(gate) * up, .., offsets)

Row-wise operations stay as they are; a norm inside an expert is followed by each row's own scale and shift. Views of a
parameter become views of its stack; products that an expert computes in slices of its weights become whole
(`whole_products`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeca_fx.autocast import OFF
from moeca_fx.discover.reference import tolerance_of
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.graph.expert_stack import stacked_view
from moeca_fx.graph.functional import functional_module
from moeca_fx.graph.layout import NotTokenWise, TokenAxes, propagate
from moeca_fx.graph.rewrite import attribute, example_value
from moeca_fx.graph.slicing import between
from moeca_fx.graph.whole_products import whole_products
from moeca_fx.ops.grouped_linear import grouped_linear
from moeca_fx.reasons import Reason

aten = torch.ops.aten
ROWS = TokenAxes(0, 0)
_GROUPED = grouped_linear._opoverload


def _shift(dim: int, rank: int) -> int:
    """Position of a parameter's dimension in its stack."""
    return dim % rank + 1


# View operations on a parameter, and casts of it, and how their arguments read on the stack: (args, rank) -> args.
_VIEWS: dict[Any, Callable[[tuple[Any, ...], int], tuple[Any, ...]]] = {
    aten.split.Tensor: lambda a, r: (a[1], _shift(a[2] if len(a) > 2 else 0, r)),
    aten.split_with_sizes.default: lambda a, r: (a[1], _shift(a[2] if len(a) > 2 else 0, r)),
    aten.slice.Tensor: lambda a, r: (_shift(a[1] if len(a) > 1 else 0, r), *a[2:]),
    aten.select.int: lambda a, r: (_shift(a[1], r), a[2]),
    aten.unbind.int: lambda a, r: (_shift(a[1] if len(a) > 1 else 0, r),),
    aten.transpose.int: lambda a, r: (_shift(a[1], r), _shift(a[2], r)),
    aten.unsqueeze.default: lambda a, r: (_shift(a[1], r + 1),),
    aten._to_copy.default: lambda a, r: (),
}


_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_NORM_PARTS = (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor))


def build_expert_program(path: str, experts: Sequence[nn.Module], example: torch.Tensor) -> fx.GraphModule:
    """Vectorise structurally identical experts whose parameters share stacked storage (`stack_in_place`).

    Args:
        path: where the experts are, for error messages.
        experts: modules of equal structure, each mapping rows [M, H] to rows [M, H].
        example: example rows [M >= 2, H].

    Returns:
        A module ``(rows [M, H], row_expert [M], offsets [E]) -> [M, H]`` over rows grouped by expert.

    Raises:
        UnsupportedModelError: an operation of the expert is not row-wise, or uses a parameter in an unknown way.
    """
    with torch.no_grad():
        exported = torch.export.export(
            experts[0], (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
        )
        source = functional_module(exported)
    builder = _Builder(path, experts, source)
    rows = source.graph.find_nodes(op="placeholder")[0]
    output: Any = source.graph.output_node().args[0]
    result = output[0] if isinstance(output, (tuple, list)) else output
    inside = between([rows], [result])
    try:
        propagate({rows: ROWS}, inside)
    except NotTokenWise as problem:
        raise UnsupportedModelError(
            f"{path}: an expert mixes rows: {problem}; only row-wise experts work", code=Reason.EXPERT_MIXES_ROWS
        ) from problem
    for node in inside:
        builder.add(node, rows)
    program = builder.finish(result)
    whole_products(program)
    if not example.is_meta:
        _prove(path, program, experts, example)
    return program


def _prove(path: str, program: fx.GraphModule, experts: Sequence[nn.Module], example: torch.Tensor) -> None:
    """Run every expert and the program on the same rows: what differs between experts must be in their parameters."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(example.shape, generator=generator).to(example)
    count = len(experts)
    grouped = rows.repeat(count, 1)
    row_expert = torch.arange(count, device=rows.device).repeat_interleave(rows.shape[0])
    offsets = torch.arange(1, count + 1, device=rows.device) * rows.shape[0]
    with torch.no_grad():
        with OFF.around():  # its casts are its own
            found = program(grouped, row_expert, offsets).chunk(count)
        for index, (expert, have) in enumerate(zip(experts, found, strict=True)):
            want = expert(rows)
            error = float((want - have).abs().max() / want.abs().max().clamp_min(1e-30))
            if not error <= tolerance_of(want.dtype):
                raise UnsupportedModelError(
                    f"{path}: expert {index} differs from its vectorised form by {error:.1e} relative; experts may "
                    "differ in their parameters only, not in constants or operations",
                    code=Reason.EXPERTS_DIFFER,
                )


@dataclass
class _Builder:
    path: str
    experts: Sequence[nn.Module]
    source: fx.GraphModule
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    stacks: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = self.graph.placeholder("rows")
        self.row_expert = self.graph.placeholder("row_expert")
        self.offsets = self.graph.placeholder("offsets")

    def add(self, node: fx.Node, rows: fx.Node) -> None:
        self.made.setdefault(rows, self.rows)
        parameters = [source for source in node.all_input_nodes if source not in self.made]
        if node.target is aten.linear.default:
            self.made[node] = self._linear(*node.args)
        elif node.target in (aten.matmul.default, aten.mm.default) and parameters == [node.args[1]]:
            transposed = self.graph.call_function(aten.transpose.int, (self._stack(parameters[0]), 1, 2))
            self.made[node] = self.graph.call_function(
                _GROUPED, (self._made(node.args[0]), transposed, None, self.offsets)
            )
        elif node.target in _NORMS and parameters:
            self.made[node] = self._norm(node)
        elif not parameters:
            self.made[node] = self.graph.node_copy(node, self.made.__getitem__)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rank = example_value(node).dim()
            gathered = {source: self._per_row(source, rank) for source in parameters}
            self.made[node] = self.graph.node_copy(node, lambda n: gathered.get(n) or self.made[n])
        else:
            raise self._unsupported(node)
        if (value := example_value(node)) is not None:
            self.made[node].meta["val"] = value

    def _made(self, node: Any) -> fx.Node:
        return self.made[node]

    def _linear(self, x: Any, weight: Any, bias: Any = None) -> fx.Node:
        arguments = (self.made[x], self._stack(weight), self._stack(bias) if bias is not None else None, self.offsets)
        return self.graph.call_function(_GROUPED, arguments)

    def _norm(self, node: fx.Node) -> fx.Node:
        """Normalise without parameters, then scale and shift each row by those of its expert."""
        target: Any = node.target
        names = [argument.name for argument in target._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        parts = [(given.pop(name, None), operation) for name, operation in _NORM_PARTS]
        made = self.graph.call_function(target, (self.made[given.pop("input")],), given)
        for parameter, operation in parts:
            if parameter is not None:
                own = self._per_row(parameter, example_value(node).dim())
                made = self.graph.call_function(operation, (made, own))
        return made

    def _per_row(self, node: fx.Node, rank: int) -> fx.Node:
        """Each row's own vector or number, shaped to broadcast against row tensors of `rank` axes."""
        value = example_value(node)
        if not isinstance(value, torch.Tensor) or value.dim() > 1:
            raise self._unsupported(node)
        picked = self.graph.call_function(aten.index_select.default, (self._stack(node), 0, self.row_expert))
        shape = [-1, *[1] * (rank - 1 - value.dim()), *value.shape]
        return self.graph.call_function(aten.reshape.default, (picked, shape))

    def _stack(self, node: fx.Node) -> fx.Node:
        """The stacked counterpart of a parameter, or of a view of one."""
        if node not in self.stacks:
            if node.op == "get_attr":
                self.stacks[node] = self._stacked_parameter(str(node.target))
            elif node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
                source: Any = node.args[0]
                self.stacks[node] = self.graph.node_copy(node, lambda _: self._stack(source))
            elif node.target in _VIEWS:
                source = node.args[0]
                rank = example_value(source).dim()
                arguments = _VIEWS[node.target](node.args, rank)
                stack = self._stack(source)
                self.stacks[node] = self.graph.call_function(node.target, (stack, *arguments), node.kwargs)  # type: ignore[arg-type]
            else:
                raise self._unsupported(node)
        return self.stacks[node]

    def _stacked_parameter(self, name: str) -> fx.Node:
        stack = stacked_view([attribute(expert, name) for expert in self.experts])
        if stack is None:
            raise UnsupportedModelError(
                f"{self.path}: buffer or constant {name!r} of the experts has no common storage; "
                "only parameters can differ between experts",
                code=Reason.EXPERTS_DIFFER,
            )
        attribute_name = name.replace(".", "_")
        self.root.register_buffer(attribute_name, stack, persistent=False)
        return self.graph.get_attr(attribute_name)

    def _unsupported(self, node: fx.Node) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path}: operation {node.target} (node {node.name}) uses an expert's parameter in a way that cannot "
            "be vectorised; supported: linear, matmul, norms, element-wise use of a vector, views of a parameter",
            code=Reason.EXPERT_OPERATION,
        )

    def finish(self, result: fx.Node) -> fx.GraphModule:
        self.graph.output(self.made[result])
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)
