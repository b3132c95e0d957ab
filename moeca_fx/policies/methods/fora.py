"""FORA (arXiv 2407.01425): every sublayer's output is held for a whole cycle."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.rules import SublayerRule
from moeca_fx.policies.schedule import Cycle


@dataclass(frozen=True)
class FORA(Method):
    """Full iff ``step % interval == 0``; else attention and feed-forward outputs, before their gates, are reused."""

    method: ClassVar[str] = "fora"

    interval: int = 4

    def policy(self) -> Policy:
        """A cycle, held sublayers."""
        return Policy(Cycle(self.interval), (SublayerRule(),))
