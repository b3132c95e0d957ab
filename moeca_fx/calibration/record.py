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
    """

    inputs: Tensor
    outputs: Tensor
    final: Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

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


@torch.no_grad()
def record(sampler: Sampler, model: Model) -> Recording:
    """Run `sampler` once on the unmodified `model` and keep every step.

    Raises:
        InputError: the sampler never called the model, or its calls differ in shape.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def listening(state: Tensor, *rest: Any, **named: Any) -> Any:
        output = model(state, *rest, **named)
        inputs.append(state.detach().clone())
        outputs.append(first_output(output).detach().clone())
        arguments.append((rest, named))
        return output

    final = sampler(listening)
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
    return Recording(torch.stack(inputs), torch.stack(outputs), final.detach().clone(), tuple(arguments))
