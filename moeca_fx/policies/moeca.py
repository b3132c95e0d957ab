"""The MoECa policy (arXiv 2606.15615): its choices as one validated, frozen config."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moeca_fx.errors import ConfigError

ScoreWeight = Literal["share", "raw"]
EntropyNorm = Literal["minmax", "log"]
AttentionMode = Literal["synchronized", "reuse", "full"]
RowMode = Literal["inherit", "reuse", "full"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "score_weight": ("share", "raw"),
    "entropy_norm": ("minmax", "log"),
    "attention": ("synchronized", "reuse", "full"),
    "dense_ffn": ("inherit", "reuse", "full"),
    "shared_expert": ("inherit", "reuse", "full"),
}


@dataclass(frozen=True)
class MoECa:
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

    def __post_init__(self) -> None:
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise _out_of_range("interval", "an integer >= 1", self.interval)
        for name in ("tau0", "lambda1", "lambda2"):
            self._check_number(name, "a finite number >= 0", upper=math.inf)
        for name in ("alpha", "beta"):
            self._check_number(name, "a number in [0, 1)", upper=1.0)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise _out_of_range(name, "one of " + ", ".join(map(repr, choices)), value)

    def _check_number(self, name: str, expected: str, upper: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 0 <= value < upper:
            raise _out_of_range(name, expected, value)

    def is_full_step(self, step: int) -> bool:
        """Whether step `step` (0 is the trajectory's first) computes everything."""
        return step % self.interval == 0

    def as_dict(self) -> dict[str, Any]:
        """Field names and values, ready for JSON."""
        return asdict(self)


def _out_of_range(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(f"MoECa.{name}: expected {expected}, found {found!r}; pass a value in that range")
