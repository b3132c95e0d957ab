"""A session: one sampling run whose steps are announced, so that nothing about it is guessed from timesteps.

    with fast.session() as session:      new trajectories
        for t in timesteps:
            a = fast(x, t, text)         the first call of a step has a trajectory,
            b = fast(x, t, nothing)      the second one its own: separate guidance needs no contexts
            x = ...                      any solver: timesteps may repeat (Heun) or jump
            session.next_step()
                                         caches freed

A trajectory goes on in the call of the next step that shares most of its input tensors, by place in memory: guidance
that is left out for a while, or calls in another order, do not mix what belongs to other prompts. Where all inputs are
new at every step, the order of the calls decides. What a step does not call is over.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_MOST_BEFORE_A_STEP = 16
_NEVER_STEPPED = (
    "no step was announced between its calls: expected session.next_step(), or in a pipeline a call of its scheduler's "
    "step, after each step"
)
_ENDED = "the run ended"


@dataclass(frozen=True)
class Ended:
    """A trajectory of a session that is over: its `steps`, and `why` it reused nothing (None when it did)."""

    steps: int
    why: str | None


@dataclass(eq=False)
class _Line:
    """The calls of one trajectory.

    Attributes:
        key: its context in the runtime; context: the one that the caller named.
        inputs: (index, tensor, version) of its last call; held, so that no other tensor takes their memory.
        shared: how many inputs every call shared with the one before; None before the second call.
        called: whether this step has called it.
    """

    key: str
    context: str
    inputs: list[tuple[int, Tensor, int]] = field(default_factory=list)
    shared: int | None = None
    called: bool = False

    def score(self, inputs: Sequence[tuple[int, Tensor, int]]) -> int:
        """How many of the inputs are those of the last call, unchanged."""
        before = {index: (tensor, version) for index, tensor, version in self.inputs}
        return sum(
            index in before and version == before[index][1] and _same_memory(tensor, before[index][0])
            for index, tensor, version in inputs
        )


class Session:
    """Tells calls apart while a run lasts.

    Args:
        number: makes its keys unlike those of other sessions.
        end: takes the keys of trajectories that are over and why; returns what they were.

    Attributes:
        steps: announced steps in which the model was called; calls: calls so far.
        ended: trajectories that are over.
    """

    def __init__(self, number: int, end: Callable[[Iterable[str], str], list[Ended]]) -> None:
        self.number = number
        self.steps = self.calls = 0
        self.ended: list[Ended] = []
        self._end = end
        self._lines: list[_Line] = []
        self._opened = 0

    def next_step(self) -> None:
        """The calls so far are one step; those to come belong to the next. Without calls in between, nothing."""
        if not any(line.called for line in self._lines):
            return
        self.steps += 1
        self._drop([line for line in self._lines if not line.called], "the sampler no longer called it at every step")
        for line in self._lines:
            line.called = False

    def restart(self) -> None:
        """The next call begins new trajectories: the sampler starts over."""
        self._drop(list(self._lines), "the sampler set new timesteps")

    def close(self) -> None:
        """End everything and free the caches."""
        self._drop(list(self._lines), _ENDED if self.steps or self.calls < 2 else _NEVER_STEPPED)

    def key(self, context: str, leaves: Sequence[Any]) -> str:
        """The runtime's context for a call.

        Args:
            context: what the caller named; calls of other contexts never share a trajectory.
            leaves: the flat inputs.
        """
        inputs = [(index, leaf, _version(leaf)) for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        line = self._find(context, inputs) or self._open(context)
        if line.inputs:
            score = line.score(inputs)
            line.shared = score if line.shared is None else min(score, line.shared)
        line.inputs, line.called = inputs, True
        self.calls += 1
        return line.key

    def _find(self, context: str, inputs: Sequence[tuple[int, Tensor, int]]) -> _Line | None:
        """The line that the call continues: the best match, the first of equals."""
        free = [(line.score(inputs), line) for line in self._lines if line.context == context and not line.called]
        fitting = [(score, line) for score, line in free if line.shared is None or score >= line.shared]
        return max(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def _open(self, context: str) -> _Line:
        if not self.steps and len(self._lines) == _MOST_BEFORE_A_STEP:
            self._drop(self._lines[:1], _NEVER_STEPPED)  # without steps every call opens one: bound what they hold
        self._opened += 1
        line = _Line(f"session {self.number} {context} {self._opened}", context)
        self._lines.append(line)
        return line

    def _drop(self, lines: list[_Line], why: str) -> None:
        self.ended += self._end([line.key for line in lines], why)
        self._lines = [line for line in self._lines if line not in lines]


def _version(tensor: Tensor) -> int:
    """How often it was written to; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _same_memory(one: Tensor, other: Tensor) -> bool:
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (one, other)]
    return places[0] == places[1]
