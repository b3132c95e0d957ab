"""How good a *set* of images is, from what a classifier of the same data makes of it.

Two published measures with another classifier than Inception, and named after it: a number from here compares with
other numbers from the same classifier and of as many samples, never with a paper's. The classifier of a trained
zoo model is `moeca_fx.zoo.judge.load_judge`. torchmetrics comes with the extra ``demo``.
"""

import torch
from torch import Tensor, nn

from moeca_fx.errors import InputError, require

FRECHET_LABEL = "FID (judge features)"
SCORE_LABEL = "IS (judge)"
SUM_TOLERANCE = 1e-3


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian (FID, arXiv 1706.08500, equation 6).

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) with means m and unbiased covariances C, in float64. It falls with the
    number of samples: compare sets of one size only.

    Args:
        features: of the images to judge, [N, D].
        reference: of the images they should be like, [M, D].

    Returns:
        At least 0, in the features' unit squared.

    Raises:
        InputError: other shapes, values that are not finite, or no more samples than dimensions, N <= D or M <= D.
        MissingExtraError: torchmetrics is not installed.
    """
    for what, tensor in (("features", features), ("reference", reference)):
        _check("frechet_distance", what, tensor)
    width = features.shape[1]
    if reference.shape[1] != width:
        raise InputError(
            f"frechet_distance: features are {width} wide but reference is {reference.shape[1]} wide; "
            "take both from one classifier"
        )
    for what, tensor in (("features", features), ("reference", reference)):
        if len(tensor) <= width:
            raise InputError(
                f"frechet_distance: {what} has {len(tensor)} samples of {width} dimensions; a covariance of that many "
                f"dimensions needs at least {width + 1} samples, draw more"
            )
    require("torchmetrics", "demo")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(width)).to(features.device)
    metric.update(reference.double(), real=True)
    metric.update(features.to(reference.device).double(), real=False)
    return max(0.0, float(metric.compute()))  # rounding may leave -1e-16


def inception_score(probabilities: Tensor) -> float:
    """exp(mean KL(p(y|x) || p(y))), the Inception score (arXiv 1606.03498, section 4) of any classifier.

    All samples form one split. It rewards confident classes and many of them: 1 when every image looks alike to
    the classifier, K when K classes are certain and equally frequent. It never looks at real images.

    Args:
        probabilities: the classifier's, one row an image, [N, K].

    Returns:
        Between 1 and K.

    Raises:
        InputError: another shape, or rows that are no probabilities.
    """
    _check("inception_score", "probabilities", probabilities)
    conditional = probabilities.double()
    off = (conditional.sum(dim=1) - 1).abs().max()
    if conditional.min() < 0 or off > SUM_TOLERANCE:
        raise InputError(
            "inception_score: expected rows of probabilities that sum to 1, found a smallest value of "
            f"{float(conditional.min()):.3g} and a sum off by {float(off):.3g}; pass softmax outputs, not logits"
        )
    marginal = conditional.mean(dim=0)  # [K]
    # xlogy is 0 where a probability is 0; a class no image has adds 0 to both terms.
    divergence = (torch.xlogy(conditional, conditional) - torch.xlogy(conditional, marginal)).sum(dim=1)
    return float(divergence.mean().exp())


class _Given(nn.Identity):
    """Tells torchmetrics that its input is the features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


def _check(caller: str, what: str, tensor: Tensor) -> None:
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise InputError(f"{caller}: expected {what} of shape [samples, width], found {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{caller}: {what} holds values that are not finite; check the images they come from")
