"""Whether every expert enters the sum with the weight that was found, to a fraction of a percent, in any dtype.

The largest error of a bf16 sum hides an expert that is one percent off. Projected on that expert's own contribution,
rounding averages out over tokens and channels, and a wrong factor does not:

    left = model's sum - sum_k weight_k * expert_k(x)          off_e = <left, part_e> / <part_e, part_e>
    off_e = 0.0003 +- 0.0004: rounding                         off_e = 0.0101 +- 0.0004: expert e is one percent off

Few numbers average little out, and an expert that no token chose shows nothing, so more calls are looked at until every
expert's factor is known well enough; they are made one by one, and models of real width need the first alone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeca_fx.autocast import computed_in
from moeca_fx.discover.inline.tape import NotReplayable
from moeca_fx.discover.reference import tolerance_of
from moeca_fx.reasons import Reason

ALLOWED = 4e-3  # a routing weight that is rounded to bf16 on the way is off by as much
SURE = 4.0  # standard deviations of the rounding error
_WELL_KNOWN = 3e-3  # largest uncertainty of a factor at which no more calls are looked at


@dataclass(frozen=True)
class Sample:
    """One call of the dispatch.

    Attributes:
        x, expert, weight: rows [..., H], ids and weights, k a row.
        routed: what the model computed for ``sum_k weight_k * expert_k(x)`` [N, H], fp64.
        rounded: the value of the model that `routed` was taken from, in its dtype: its rounding is the noise.
        proven: whether the sum is known to be that of the experts, up to their factors.
    """

    x: Tensor
    expert: Tensor
    weight: Tensor
    routed: Tensor
    rounded: Tensor
    proven: bool = True


@dataclass
class _Evidence:
    """Sums over tokens and channels of one expert's parts p, what is left l, and the model's rounding r."""

    pp: float = 0.0
    lp: float = 0.0
    lplp: float = 0.0
    lppp: float = 0.0
    pppp: float = 0.0
    rprp: float = 0.0

    def add(self, part: Tensor, left: Tensor, rounding: Tensor) -> None:
        square, product = part.square(), left * part
        self.pp += float(square.sum())
        self.lp += float(product.sum())
        self.lplp += float(product.square().sum())
        self.lppp += float((product * square).sum())
        self.pppp += float(square.square().sum())
        self.rprp += float((rounding * part).square().sum())

    @property
    def is_known(self) -> bool:
        """Whether more calls need not be looked at."""
        return self.pp > 0 and self.unsure <= _WELL_KNOWN

    @property
    def off(self) -> float:
        """Its factor less one."""
        return self.lp / self.pp

    @property
    def unsure(self) -> float:
        """How far `off` may be off by rounding: as expected of the dtype, or as seen, whichever is more."""
        seen = self.lplp - 2 * self.off * self.lppp + self.off**2 * self.pppp
        return SURE * math.sqrt(max(seen, self.rprp, 0.0)) / self.pp


class OffScale(NotReplayable):
    """An expert enters the sum with another weight than the one that was found."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, Reason.WEIGHTS_OFF)


def check_scales(experts: Sequence[nn.Module], samples: Iterable[Sample], strict: bool = False) -> None:
    """Every expert must have its weight.

    Args:
        experts: one module an expert.
        samples: calls, taken until every factor is well known.
        strict: whether factors that stay unknown are refused too: of several readings of one model, the one that shows
            least must not win because it shows least.

    Raises:
        OffScale: an expert has another one, or (strict) may have.
    """
    evidence = [_Evidence() for _ in experts]
    for sample in samples:
        _look_at(experts, sample, evidence)
        if all(each.is_known for each in evidence):
            break
    for index, each in enumerate(evidence):
        if each.pp > 0 and abs(each.off) > ALLOWED + each.unsure:
            raise OffScale(f"expert {index} enters the sum with {1 + each.off:.4f} times its routing weight")
    for index, each in enumerate(evidence):
        if strict and not each.is_known:
            raise OffScale(f"expert {index} enters the sum with an unknown number of times its routing weight")


def _look_at(experts: Sequence[nn.Module], sample: Sample, evidence: Sequence[_Evidence]) -> None:
    """Add what one call shows."""
    tokens = sample.x.reshape(-1, sample.x.shape[-1])
    ids = sample.expert.reshape(tokens.shape[0], -1)
    scale = sample.weight.reshape(tokens.shape[0], -1).double()
    parts: list[tuple[Tensor, Tensor] | None] = []
    left = sample.routed.clone()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for index, module in enumerate(experts):
            token, slot = torch.where(ids == index)
            part = module(tokens[token]).double() * scale[token, slot].unsqueeze(-1) if token.numel() else None
            used = part is not None and float(part.square().sum()) > 0
            parts.append((token, part) if part is not None and used else None)
            if part is not None:
                left.index_add_(0, token, -part)
    if not sample.proven and not _explained(left, parts, sample):
        return
    rounding = sample.rounded.reshape(left.shape).double() * (
        torch.finfo(computed_in(sample.rounded.dtype)).eps / 12**0.5
    )
    for each, found in zip(evidence, parts, strict=True):
        if found is not None:
            token, part = found
            each.add(part, left[token], rounding[token])


def _explained(left: Tensor, parts: Sequence[tuple[Tensor, Tensor] | None], sample: Sample) -> bool:
    """Whether what is left is rounding, or one expert's contribution times a factor."""
    best, factor = None, 0.0
    gain = 0.0
    for found in parts:
        if found is not None:
            token, part = found
            product, size = float((left[token] * part).sum()), float(part.square().sum())
            if product**2 / size > gain:
                best, factor, gain = found, product / size, product**2 / size
    rest = left if best is None else left.index_add(0, best[0], -factor * best[1])
    limit = tolerance_of(sample.rounded.dtype) * float(sample.routed.abs().max())
    return bool(torch.isfinite(rest).all()) and float(rest.abs().max()) <= limit
