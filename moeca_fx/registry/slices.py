"""Experts over slices of stacked parameters: one module an expert, nothing copied.

gate [E, H, I], down [E, I, H], scale [E]   -->   expert e: compute(x, gate[e], down[e], scale[e])
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from moeca_fx.errors import ConfigError


class SlicedExpert(nn.Module):
    """One expert over its slices."""

    def __init__(self, rows: dict[str, Tensor], compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.names, self.compute = tuple(rows), compute
        for name, row in rows.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(row, requires_grad=False))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Rows [M, H] -> [M, H]."""
        return self.compute(x, *(self.get_parameter(name.replace(".", "_")) for name in self.names))


def slices(module: nn.Module, names: Sequence[str], compute: Callable[..., Tensor]) -> list[nn.Module]:
    """One module an expert over stacked parameters, for `Entry.experts`.

    Args:
        module: has the parameters.
        names: of parameters with a leading expert dimension, all of one size E.
        compute: ``(rows [M, H], a slice of each parameter in the order of names) -> [M, H]``; row by row.

    Raises:
        ConfigError: the parameters are of different leading sizes.
    """
    stacks = {name: module.get_parameter(name).detach() for name in names}
    sizes = {name: stack.shape[0] if stack.dim() else 0 for name, stack in stacks.items()}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"slices: expected parameters of one leading size, the number of experts, found {sizes}")
    count = next(iter(sizes.values()))
    return [SlicedExpert({name: stack[index] for name, stack in stacks.items()}, compute) for index in range(count)]
