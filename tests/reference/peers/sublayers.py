"""Policies that reuse the outputs of attention and feed-forward: FORA and TaylorSeer."""

from typing import Any

from torch import Tensor

from tests.reference.peers import network
from tests.reference.peers.base import FULL, Reference
from tests.reference.peers.differences import Differences
from tests.reference.peers.schedules import is_full


class SublayerReference(Reference):
    """Runs every block with sublayer outputs of its own: subclasses say what they are.

    Embedding, condition, norms, modulation, gates and the final layer are always the current step's.
    """

    def hidden(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, H] after the last block, and the condition [B, H]."""
        condition = network.condition_of(self.model, t, y)
        tokens = network.embed(self.model, x)
        for index, block in enumerate(self.model.blocks):
            vectors = network.modulation(block, condition)
            inputs = network.attention_input(block, tokens, vectors)
            tokens = tokens + vectors.gate_attention * self.attention(index, inputs)
            inputs = network.ffn_input(block, tokens, vectors)
            tokens = tokens + vectors.gate_ffn * self.ffn(index, inputs)
        return tokens, condition

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction [B, C', S, S] of a step that runs every block."""
        return network.finish(self.model, *self.hidden(x, t, y))

    def attention(self, index: int, inputs: Tensor) -> Tensor:
        """Output [B, T, H], before the gate, of block `index`'s attention; `inputs` are its current inputs."""
        raise NotImplementedError

    def ffn(self, index: int, inputs: Tensor) -> Tensor:
        """Output [B, T, H], before the gate, of block `index`'s feed-forward; `inputs` are its current inputs."""
        raise NotImplementedError


class FORA(SublayerReference):
    """Full iff j mod N == 0, else every sublayer output of the last full step is reused (arXiv 2407.01425).

    Args:
        model: the model.
        interval: N.
    """

    def __init__(self, model: Any, interval: int = 4) -> None:
        super().__init__(model)
        self.interval = interval
        self.full = True
        self.cache: dict[tuple[int, str], Tensor] = {}

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        self.full = is_full(j, self.interval, warmup=1)
        return self.predict(x, t, y), FULL if self.full else "fora"

    def attention(self, index: int, inputs: Tensor) -> Tensor:
        if self.full:
            self.cache[index, "attention"] = network.attention(self.model.blocks[index], inputs)
        return self.cache[index, "attention"]

    def ffn(self, index: int, inputs: Tensor) -> Tensor:
        if self.full:
            self.cache[index, "ffn"] = network.ffn(self.model.blocks[index], inputs)
        return self.cache[index, "ffn"]


class TaylorSeer(SublayerReference):
    """The first steps full, then every N-th; else each sublayer output is forecast (arXiv 2503.06923).

    Args:
        model: the model.
        order: O of the finite differences; 0 holds the last value.
        interval: N, see `schedules.is_full`.
        warmup: number of first steps that are full.
    """

    def __init__(self, model: Any, order: int = 1, interval: int = 4, warmup: int = 2) -> None:
        super().__init__(model)
        self.interval, self.warmup = interval, warmup
        self.j = 0
        self.full = True
        self.differences = {
            (index, name): Differences(order) for index in range(len(model.blocks)) for name in ("attention", "ffn")
        }

    def step(self, j: int, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, str]:
        self.j, self.full = j, is_full(j, self.interval, self.warmup)
        return self.predict(x, t, y), FULL if self.full else "taylorseer"

    def attention(self, index: int, inputs: Tensor) -> Tensor:
        differences = self.differences[index, "attention"]
        if not self.full:
            return differences.predict(self.j)
        output = network.attention(self.model.blocks[index], inputs)
        differences.update(self.j, output)
        return output

    def ffn(self, index: int, inputs: Tensor) -> Tensor:
        differences = self.differences[index, "ffn"]
        if not self.full:
            return differences.predict(self.j)
        output = network.ffn(self.model.blocks[index], inputs)
        differences.update(self.j, output)
        return output
