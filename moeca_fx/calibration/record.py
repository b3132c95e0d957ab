"""Record what a sampler feeds the model and what the model answers, step by step.

A *sampler* here is a closure over noise, labels and seeds that takes a model and returns the final images, e.g.
``lambda model: sample(model, noise, labels, steps=50)``. It must do the same at every call: a stochastic one makes its
generator anew from a seed each time. A sampler that calls the model twice a step has that many more steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moeca_fx.errors import InputError

Model = Callable[..., Any]
Sampler = Callable[[Model], Tensor]


@dataclass(frozen=True)
class Recording:
    """One uncached run of a batch; S steps.

    Attributes:
        inputs: [S, B, C, ...] the state that each call got.
        outputs: [S, B, D, ...] what the model answered (its first output); D > C where it also predicts variances.
        final: [B, ...] what the sampler returned.
        arguments: per step, everything else that the call got: positional arguments after the state, keywords.
        answer: what the first call returned, its first tensor emptied: the shape of an answer, see `with_first`.
    """

    inputs: Tensor
    outputs: Tensor
    final: Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    answer: Any

    @property
    def steps(self) -> int:
        """S."""
        return int(self.inputs.shape[0])

    @property
    def states(self) -> Tensor:
        """[S, B, K]: the inputs, flattened to one row a sample."""
        return self.inputs.flatten(2)

    @property
    def velocities(self) -> Tensor:
        """[S, B, K]: the channels of the outputs that move the state, flattened."""
        return self.outputs[:, :, : self.inputs.shape[2]].flatten(2)


def first_output(output: Any) -> Tensor:
    """The tensor a model returns, or the first of a tuple.

    Raises:
        InputError: it is neither.
    """
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise InputError(
            f"calibration: expected the model to return a tensor or a tuple that starts with one, "
            f"found {type(output).__name__}"
        )
    return first


def with_first(output: Any, value: Tensor) -> Any:
    """A model's answer with another first tensor: `value` alone, or in the place of the first of a tuple or list."""
    if isinstance(output, Tensor):
        return value
    rest = [value, *output[1:]]
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


class OneCallAStep:
    """What stands for the model in a sampler during calibration: called once a step, the state first.

    Args:
        answer: called as ``answer(state, *rest, **named)``.
    """

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def __call__(self, *args: Any, **named: Any) -> Any:
        """One step.

        Raises:
            InputError: the state is not the first positional argument.
        """
        if not args or not isinstance(args[0], Tensor):
            raise InputError(
                "calibration: expected the sampler to call the model with the state as its first positional argument, "
                f"found {'the keywords ' + ', '.join(named) if named else type(args[0]).__name__}; wrap the model in a "
                "function that takes the state first"
            )
        return self._answer(*args, **named)

    def context(self, name: str) -> Any:
        """Refused: contexts mean two calls a step.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"calibration: expected one call of the model a step, found context({name!r}), guidance in two calls; "
            "calibrate without guidance"
        )


@torch.no_grad()
def record(sampler: Sampler, model: Model) -> Recording:
    """Run `sampler` once on the unmodified `model` and keep every step.

    Raises:
        InputError: the sampler never called the model, or its calls differ in shape.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    answers: list[Any] = []

    def listening(state: Tensor, *rest: Any, **named: Any) -> Any:
        output = model(state, *rest, **named)
        inputs.append(state.detach().clone())
        outputs.append(first_output(output).detach().clone())
        # A sampler may change its tensors in place.
        arguments.append(pytree.tree_map(_own, (rest, named)))
        if not answers:
            answers.append(output)
        return output

    final = sampler(OneCallAStep(listening))
    if not inputs:
        raise InputError("record: the sampler returned without calling the model; pass a sampler that runs it")
    shapes = {(tuple(state.shape), tuple(output.shape)) for state, output in zip(inputs, outputs, strict=True)}
    if len(shapes) != 1:
        raise InputError(f"record: expected calls of one shape, found {sorted(shapes)}; calibrate on a fixed batch")
    state, output = inputs[0], outputs[0]
    if output.shape[0] != state.shape[0] or output.shape[1] < state.shape[1] or output.shape[2:] != state.shape[2:]:
        raise InputError(
            f"record: expected an output shaped as the state {tuple(state.shape)}, at most with more channels, "
            f"found {tuple(output.shape)}"
        )
    kept = with_first(pytree.tree_map(_own, answers[0]), output[:0])
    return Recording(torch.stack(inputs), torch.stack(outputs), final.detach().clone(), tuple(arguments), kept)


def _own(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
