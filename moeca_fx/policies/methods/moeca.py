"""MoECa (arXiv 2606.15615): expert branches matched by identity, scored, and recomputed above a threshold."""

from dataclasses import dataclass
from typing import ClassVar

from moeca_fx.policies.branch import EntropyNorm, ScoreWeight
from moeca_fx.policies.checks import check_integer, check_number
from moeca_fx.policies.policy import Method, Policy
from moeca_fx.policies.rules import AttentionMode, BranchRule, RowMode
from moeca_fx.policies.schedule import Cycle
from moeca_fx.policies.selector import ScoreThreshold


@dataclass(frozen=True)
class MoECa(Method):
    """Expert-branch caching as published; the numbers are the paper's, what it leaves open is settled by measurement.

    Args:
        interval: cycle length N; step j of a trajectory is full when ``j % interval == 0``. 1 makes every step full.
        tau0: base threshold of the recomputation score (Eq. 12), >= 0. 0 recomputes (almost) everything.
        alpha: how far the threshold follows an expert's spatial entropy (Eq. 12), in [0, 1). 0 is a fixed threshold.
        beta: memory of the expert activation statistic (Eq. 10), in [0, 1).
        lambda1: weight of the routing-weight drift in the score (Eq. 9), >= 0.
        lambda2: weight of the cached branch's contribution in the score (Eq. 9), >= 0.
        score_weight: what the score reads: ``"share"`` of a token's total routing weight, or the ``"raw"`` weight.
        entropy_norm: entropy scaled to [0, 1] by log T (``"log"``) or over the experts of a site (``"minmax"``).
        attention: ``"synchronized"`` refreshes the rows of tokens with a recomputed branch (section 4.1);
            ``"reuse"`` keeps the cached output on cached steps; ``"full"`` recomputes attention at every step.
        dense_ffn: dense blocks ``"inherit"`` the refreshed tokens of the nearest earlier MoE site, ``"reuse"`` or run
            ``"full"``.
        shared_expert: ``"inherit"`` recomputes the tokens with a recomputed branch; ``"reuse"``; ``"full"``.

    Raises:
        ConfigError: a field is out of its range.
    """

    method: ClassVar[str] = "moeca"

    interval: int = 4
    tau0: float = 0.8
    alpha: float = 0.6
    beta: float = 0.65
    lambda1: float = 1.1
    lambda2: float = 0.6
    score_weight: ScoreWeight = "share"
    entropy_norm: EntropyNorm = "log"
    attention: AttentionMode = "synchronized"
    dense_ffn: RowMode = "inherit"
    shared_expert: RowMode = "inherit"

    def _check(self) -> None:
        check_integer(self, "interval", 1)
        for name in ("tau0", "lambda1", "lambda2"):
            check_number(self, name)
        for name in ("alpha", "beta"):
            check_number(self, name, "a number in [0, 1)", upper=1.0)

    def policy(self) -> Policy:
        """A cycle, and the branch level with the score's threshold."""
        selector = ScoreThreshold(
            tau0=self.tau0,
            alpha=self.alpha,
            beta=self.beta,
            lambda1=self.lambda1,
            lambda2=self.lambda2,
            score_weight=self.score_weight,
            entropy_norm=self.entropy_norm,
        )
        rule = BranchRule(
            selector=selector,
            attention=self.attention,
            dense_ffn=self.dense_ffn,
            shared_expert=self.shared_expert,
        )
        return Policy(Cycle(self.interval), (rule,))
