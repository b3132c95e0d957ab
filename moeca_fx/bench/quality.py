"""How good a run's images are and what they took, as one record."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moeca_fx.bench.contestants import Contestant
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject
from moeca_fx.distribution import frechet_distance, inception_score
from moeca_fx.evaluate import psnr, psnr_per_image, ssim
from moeca_fx.zoo.judge import load_judge
from moeca_fx.zoo.training.task import TASKS, find_task


@dataclass(frozen=True)
class Quality:
    """One run.

    Attributes:
        flops, flops_speedup: executed by all its trajectories; the original's over them.
        full_steps, other_steps: model calls a trajectory that computed everything, and the rest; means.
        psnr: dB against the original's images, over all of them together; None when equal. One image that became
            another one decides it.
        psnr_median, psnr_worst: of single images; None when equal.
        ssim: structural similarity with them.
        accuracy: share that the judge reads as the class asked for; None for a model without a judge.
        fid: Fréchet distance of the judge's features to those of real images of the same classes; None where there
            are too few images.
        inception: Inception-style score of the judge.
        reuse_ratio, match_ratio: of the routed branches of steps that are not full; None where branches are not
            what is reused.
        cache_bytes: of cached state.
    """

    flops: int
    flops_speedup: float
    full_steps: float
    other_steps: float
    psnr: float | None
    psnr_median: float | None
    psnr_worst: float | None
    ssim: float
    accuracy: float | None
    fid: float | None
    inception: float | None
    reuse_ratio: float | None
    match_ratio: float | None
    cache_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def draw_all(
    contestant: Contestant, subject: Subject, settings: BenchSettings, on_step: Callable[[], None] | None = None
) -> Tensor:
    """The images of all samples, [samples, C, S, S], batch by batch; each batch has fresh noise of its own."""

    def stepped(done: int, steps: int) -> None:
        if on_step is not None:
            on_step()

    noise, labels = subject.start(settings)
    chunks = zip(torch.split(noise, settings.batch), torch.split(labels, settings.batch), strict=True)
    return torch.cat([contestant.draw(*chunk, settings.seed + number, stepped) for number, chunk in enumerate(chunks)])


def measure(
    contestant: Contestant, images: Tensor, reference: Tensor, subject: Subject, settings: BenchSettings
) -> Quality:
    """Judge what `draw_all` drew with this contestant, which has drawn nothing else.

    Args:
        images: the contestant's, [samples, C, S, S].
        reference: the original's.
    """
    work, trajectories = contestant.work(), settings.samples // settings.batch
    equal, single = torch.equal(images, reference), psnr_per_image(images, reference)
    _, labels = subject.start(settings)
    uncached = subject.flops_per_step(settings.batch) * settings.steps * trajectories
    return Quality(
        flops=work.flops,
        flops_speedup=uncached / work.flops,
        full_steps=work.full_steps / trajectories,
        other_steps=work.other_steps / trajectories,
        psnr=None if equal else psnr(images, reference),
        psnr_median=None if equal else _finite(single.median()),
        psnr_worst=None if equal else _finite(single.min()),
        ssim=ssim(images, reference),
        reuse_ratio=work.reuse_ratio,
        match_ratio=work.match_ratio,
        cache_bytes=work.cache_bytes,
        **_judged(subject.name, images, labels),
    )


def _finite(value: Tensor) -> float | None:
    """None for an image that equals the original's."""
    return float(value) if torch.isfinite(value) else None


def _judged(name: str, images: Tensor, labels: Tensor) -> dict[str, float | None]:
    if name not in TASKS:
        return {"accuracy": None, "fid": None, "inception": None}
    judge = load_judge(name)
    features, probabilities = judge.features(images), judge.probabilities(images)
    real, real_labels = find_task(name).load_split()[0]
    same_classes = real[torch.isin(real_labels, labels)]
    enough = len(features) > features.shape[1]
    return {
        "accuracy": float((probabilities.argmax(dim=1) == labels).double().mean()),
        "fid": frechet_distance(features, judge.features(same_classes)) if enough else None,
        "inception": inception_score(probabilities),
    }
