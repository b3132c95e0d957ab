"""Calls of compiled code that do not pass through Dynamo.

At every call Dynamo gathers a graph's parameters and puts its results together: some two tenths of a millisecond for a
few hundred parameters, where a cached step may compute for one. What it did at one call tells what it does at all:

    compiled(x, t)  ->  code(w0, w1, x, t) = (a, b)  ->  (b, t, None)     arguments 2 and 3 are inputs 0 and 1, w0 and
                                                                          w1 the module's; results are b, input 1, None
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

Code = Callable[..., Sequence[Any]]
_Pick = Callable[[Sequence[Any], Sequence[Any]], Any]
"""A result, from what the code returned and the inputs."""
_PLAIN = (int, float, complex, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class _Route:
    arguments: tuple[Any, ...]  # the module's tensors; None for inputs
    moves: tuple[tuple[int, int], ...]  # (argument, input)
    picks: tuple[_Pick, ...]


class DirectCall:
    """Learns at one call through Dynamo how the code beneath is to be called; without guards, that stays so.

    Args:
        module: the graph that is compiled; its tensors may change their memory, not be replaced by others.
        options: of Inductor.
    """

    def __init__(self, module: nn.Module, options: dict[str, Any]) -> None:
        self._own = {id(tensor) for tensor in chain(module.parameters(), module.buffers())}
        self._options = options
        self._code: Code | None = None
        self._learns = True
        self._seen: tuple[tuple[Any, ...], Sequence[Any]] | None = None
        self._route: _Route | None = None

    def backend(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Code:
        """Inductor, as a backend for `torch.compile`; what its code is called with and returns is seen once."""
        inductor = torch._dynamo.lookup_backend("inductor")
        code: Code = inductor(graph, example_inputs, config_patches=self._options)  # type: ignore[call-arg]

        def run(*arguments: Any) -> Sequence[Any]:
            results = code(*arguments)
            if self._learns:
                self._seen = (arguments, results)
            return results

        self._code = code
        return run

    def learn(self, inputs: tuple[Any, ...], result: Any) -> None:
        """Find the way of a call through Dynamo; where there is none that always holds, calls go on through it."""
        seen, self._seen, self._learns = self._seen, None, False
        if seen is not None and isinstance(result, tuple):
            self._route = _route(inputs, *seen, result, self._own)

    @property
    def ready(self) -> bool:
        """Whether calls may be direct."""
        return self._route is not None

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """What the compiled graph returns for `inputs`."""
        assert self._code is not None and self._route is not None, "calls are direct once `ready`"
        arguments = list(self._route.arguments)
        for place, number in self._route.moves:
            arguments[place] = inputs[number]
        results = self._code(*arguments)
        return tuple([pick(results, inputs) for pick in self._route.picks])


def _route(
    inputs: tuple[Any, ...],
    arguments: tuple[Any, ...],
    returned: Sequence[Any],
    result: tuple[Any, ...],
    own: set[int],
) -> _Route | None:
    """None where something is from elsewhere, or one call does not tell: a tensor as two inputs, sizes as results."""
    given = {id(leaf): number for number, leaf in enumerate(inputs) if isinstance(leaf, Tensor)}
    if len(given) < sum(isinstance(leaf, Tensor) for leaf in inputs):
        return None
    if not all(isinstance(each, Tensor) and (id(each) in given or id(each) in own) for each in arguments):
        return None
    if not all(isinstance(value, Tensor) for value in returned):
        return None
    made = {id(value): number for number, value in enumerate(returned)}
    picks = [_pick(each, made, given) for each in result]
    if None in picks:
        return None
    return _Route(
        arguments=tuple(None if id(each) in given else each for each in arguments),
        moves=tuple((place, given[id(each)]) for place, each in enumerate(arguments) if id(each) in given),
        picks=tuple(pick for pick in picks if pick is not None),
    )


def _pick(value: Any, made: dict[int, int], given: dict[int, int]) -> _Pick | None:
    """How a result is found in later calls: tensors by where they are, plain values are the graph's constants."""
    if isinstance(value, _PLAIN):
        return lambda returned, inputs: value
    if id(value) in made:
        number = made[id(value)]
        return lambda returned, inputs: returned[number]
    if id(value) in given:
        number = given[id(value)]
        return lambda returned, inputs: inputs[number]
    return None
