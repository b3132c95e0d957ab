"""DuCa (arXiv 2412.18911): ToCa's steps in turn with steps that skip every block."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.methods.toca import ToCaSchedule, TopTokens
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.rules import BlocksRule, SublayerRule


@dataclass(frozen=True)
class DuCa(Method):
    """Within a cycle, odd steps are ToCa's, even ones reuse the last token stream and run the final layer alone.

    Args:
        steps, interval, fresh_ratio, bonus: as in `ToCa`.
    """

    method: ClassVar[str] = "duca"

    steps: int
    interval: int = 4
    fresh_ratio: float = 0.07
    bonus: float = 0.8

    def _check(self) -> None:
        check_integer(self, "steps", 1)
        check_integer(self, "interval", 1)
        check_number(self, "fresh_ratio")
        check_number(self, "bonus")

    def policy(self) -> Policy:
        """ToCa's schedule over two rules."""
        selector = TopTokens(self.steps, self.interval, self.fresh_ratio, self.bonus)
        rules = (SublayerRule(name="selective", selector=selector), BlocksRule(name="aggressive", residual=False))
        return Policy(ToCaSchedule(self.steps, self.interval, rules=2), rules)
