"""Experts that are rows of stacked parameters: modules over their slices, for every form that the shapes allow.

    gate_up_proj [E, H, 2I], down_proj [E, I, H]   -->   down(act(gate(x)) * up(x)), gate and up as halves, either first
    w1 [E, I, H], w2 [E, H, I], w3 [E, I, H]       -->   the same with matrices of their own, either one the gate
    w1 [E, H, I], b1 [E, I], w2 [E, I, H], b2      -->   w2(act(w1 x + b1)) + b2

No name decides: every form is tried, and the proof keeps the one that the model computes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeca_fx.autocast import Autocast
from moeca_fx.discover.inline.sampled import Outputs, spread

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Matrix:
    """A stacked matrix and its bias.

    Attributes:
        weight: name of the parameter [E, rows, columns].
        transposed: whether a slice is [in, out] instead of [out, in].
        bias: name of the parameter [E, out] or [E, 1, out]; None without.
    """

    weight: str
    transposed: bool
    bias: str | None = None


@dataclass(frozen=True)
class StackedForm:
    """What one expert computes from its slices.

    Attributes:
        up: matrices that read the rows: one (plain), two (gate, up), or one that holds both.
        down: matrix that writes the rows.
        activation: of the first of them.
        halves: for one matrix that holds both: ``gate-up`` or ``up-gate`` halves, or ``gate/up`` and ``up/gate``
            columns in turn; None otherwise.
    """

    up: tuple[Matrix, ...]
    down: Matrix
    activation: str
    halves: str | None = None

    def __str__(self) -> str:
        names = ", ".join(matrix.weight for matrix in (*self.up, self.down))
        return f"stacked {names} ({self.activation}{', gated' if self.halves or len(self.up) == 2 else ''})"


class StackedExpert(nn.Module):
    """One expert over its slices of the stacked parameters; nothing is copied."""

    def __init__(self, owner: nn.Module, form: StackedForm, index: int) -> None:
        super().__init__()
        self.form = form
        for matrix in (*form.up, form.down):
            for name in (matrix.weight, matrix.bias):
                if name is not None:
                    row = owner.get_parameter(name).detach()[index]
                    self.register_parameter(name, nn.Parameter(row.squeeze(0) if name == matrix.bias else row, False))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Rows [M, H] -> [M, H]."""
        return _forward(self.form, x, self._times)

    def _times(self, x: Tensor, matrix: Matrix) -> Tensor:
        weight = self.get_parameter(matrix.weight)
        bias = self.get_parameter(matrix.bias) if matrix.bias is not None else None
        return functional.linear(x, weight.transpose(0, 1) if matrix.transposed else weight, bias)


@dataclass(frozen=True)
class Products:
    """Products of rows with the matrices of all experts, kept for the many forms that share them.

    Attributes:
        owner: of the parameters.
        made: by rows and matrix, with the rows, so that their identity stays theirs.
    """

    owner: nn.Module
    made: dict[tuple[int, Matrix], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, rows: Tensor, matrix: Matrix) -> Tensor:
        """Rows [J, in] -> [E, J, out]."""
        key = (id(rows), matrix)
        if key not in self.made:
            # One by one: a batched product may copy the stack.
            slices = _slices(self.owner, matrix)
            product = torch.stack([functional.linear(rows, weight) for weight in slices])
            self.made[key] = (rows, _plus_bias(self.owner, matrix, product))
        return self.made[key][1]


@dataclass(frozen=True)
class StackedExperts:
    """All experts of one form, run on the same rows."""

    products: Products
    form: StackedForm
    count: int

    def outputs(self, rows: Tensor, most: int) -> Outputs | None:
        """Of rows [J, H], on at most `most` channels; None when the rows are of another width or type."""
        owner, down = self.products.owner, self.form.down
        first = owner.get_parameter(self.form.up[0].weight)
        if rows.shape[-1] != first.shape[1 if self.form.up[0].transposed else 2] or not _fit(rows, first):
            return None
        weight = owner.get_parameter(down.weight)
        width = weight.shape[2 if down.transposed else 1]
        channels = spread(width, most)

        def times(x: Tensor, matrix: Matrix) -> Tensor:
            if matrix is not down:
                return self.products.of(x, matrix)
            own = weight[..., channels] if down.transposed else weight[:, channels].transpose(1, 2)
            return _plus_bias(owner, down, x @ own, channels)  # [E, J, c]

        with torch.no_grad():
            return Outputs(_forward(self.form, rows, times).transpose(0, 1), width)


def _slices(owner: nn.Module, matrix: Matrix) -> Iterator[Tensor]:
    """Each expert's matrix [out, in]."""
    weight = owner.get_parameter(matrix.weight)
    return (row.transpose(0, 1) if matrix.transposed else row for row in weight.unbind())


def _plus_bias(owner: nn.Module, matrix: Matrix, product: Tensor, channels: Tensor | None = None) -> Tensor:
    """[E, J, out] with each expert's bias, or its channels of it."""
    if matrix.bias is None:
        return product
    bias = owner.get_parameter(matrix.bias).reshape(len(product), 1, -1)
    return product + (bias if channels is None else bias[..., channels])


def _fit(rows: Tensor, weight: Tensor) -> bool:
    """Whether a product takes their dtypes, which autocast makes equal."""
    return rows.dtype == weight.dtype or bool(Autocast.now().dtypes)


def _forward(form: StackedForm, x: Tensor, times: Callable[[Tensor, Matrix], Tensor]) -> Tensor:
    act = ACTIVATIONS[form.activation]
    inner = [times(x, matrix) for matrix in form.up]
    if len(inner) == 2:
        return times(act(inner[0]) * inner[1], form.down)
    if form.halves is None:
        return times(act(inner[0]), form.down)
    gate, up = _halves(inner[0], form.halves)
    return times(act(gate) * up, form.down)


def _halves(x: Tensor, order: str) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1) if "-" in order else (x[..., 0::2], x[..., 1::2])
    return (first, second) if order.startswith("gate") else (second, first)


def stacked_forms(parameters: Mapping[str, Tensor], width: int) -> Iterator[StackedForm]:
    """Every form of experts of width `width` that uses each of the stacked parameters once.

    Args:
        parameters: of one module, by name; those with a leading expert dimension.
        width: H of the token rows.
    """
    matrices = [name for name, tensor in parameters.items() if tensor.dim() == 3 and 1 not in tensor.shape[1:]]
    biases = [name for name in parameters if name not in matrices]  # or tables that have nothing to do with experts
    if not 2 <= len(matrices) <= 3:
        return
    for order in permutations(matrices):
        *ups, down = order
        inner = _other_size(parameters[down], width)
        shapes = [_other_size(parameters[up], width) for up in ups]
        if inner is None or any(shape not in (inner, 2 * inner) for shape in shapes):
            continue
        if len(ups) == 2 and shapes != [inner, inner]:
            continue
        fused = len(ups) == 1 and shapes[0] == 2 * inner
        orders: tuple[str | None, ...] = ("gate-up", "up-gate", "gate/up", "up/gate") if fused else (None,)
        layouts = [_matrices(up, parameters, width, reads=True, biases=biases) for up in ups]
        layouts.append(_matrices(down, parameters, width, reads=False, biases=biases))
        for chosen in product(*layouts):
            named = [matrix.bias for matrix in chosen if matrix.bias is not None]
            if len(set(named)) != len(named) or len(named) not in (0, len(chosen)):
                continue
            for activation, halves in product(ACTIVATIONS, orders):
                yield StackedForm(tuple(chosen[:-1]), chosen[-1], activation, halves)


def _other_size(tensor: Tensor, width: int) -> int | None:
    """The size beside H of a stacked matrix [E, a, b]."""
    a, b = tensor.shape[1:]
    return int(b) if a == width else int(a) if b == width else None


def _matrices(name: str, parameters: Mapping[str, Tensor], width: int, reads: bool, biases: list[str]) -> list[Matrix]:
    """Both orientations where the shape allows both, with every bias that fits."""
    rows, columns = parameters[name].shape[1:]
    found = []
    for transposed in (False, True):
        taken, given = (rows, columns) if transposed else (columns, rows)
        if (taken if reads else given) == width:
            fitting = [bias for bias in biases if parameters[bias].shape[-1] == given]
            found += [Matrix(name, transposed, bias) for bias in (None, *fitting)]
    return found


def stacked_parameters(owner: nn.Module, count: int) -> dict[str, Tensor]:
    """Parameters of the module itself whose leading dimension counts its experts."""
    return {
        name: parameter
        for name, parameter in owner.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and parameter.shape[0] == count
    }


def stacked_modules(owner: nn.Module, form: StackedForm) -> list[nn.Module]:
    """One module an expert."""
    count = owner.get_parameter(form.down.weight).shape[0]
    return [StackedExpert(owner, form, index) for index in range(count)]
