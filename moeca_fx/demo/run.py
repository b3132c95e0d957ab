"""Run the demo: build the three variants, warm them up, time them in turns, compare their images."""

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

import moeca_fx
from moeca_fx.demo.result import DemoResult, VariantResult
from moeca_fx.demo.settings import DemoSettings
from moeca_fx.evaluate import psnr, psnr_per_image, ssim
from moeca_fx.progress import Observer, SilentObserver
from moeca_fx.runtime.module import TransformedModel
from moeca_fx.timing import fastest_threads, median_speedup, most_threads, pinned_threads, time_interleaved
from moeca_fx.zoo import sampling
from moeca_fx.zoo.digits import classifier

ORIGINAL, VECTORISED, CACHED = "original", "vectorised", "cached"
TRIAL_STEPS = 4
"""Steps of the original's trial runs when the number of threads is chosen."""


@dataclass(frozen=True)
class DemoRun:
    """The numbers, and the images they were taken from.

    Attributes:
        result: the numbers.
        images: by variant, [B, 1, 8, 8] in [-1, 1].
        labels: the class asked for, [B].
    """

    result: DemoResult
    images: dict[str, Tensor]
    labels: Tensor


def run_demo(settings: DemoSettings, observer: Observer | None = None) -> DemoRun:
    """Sample the digits model as it is, vectorised and cached, from the same noise.

    Raises:
        MoecaError: an extra is missing, the model cannot be transformed, or a variant does not repeat itself.
    """
    watch = observer or SilentObserver()
    watch.stage("building the model")
    model = moeca_fx.zoo.build("digits")
    noise, labels = sampling.noise_and_labels(settings.batch, settings.seed)
    trial = partial(sampling.sample, model, noise, labels, steps=TRIAL_STEPS)
    threads = settings.threads or fastest_threads(trial, most_threads())
    settings = replace(settings, threads=threads)
    with pinned_threads(threads):
        return _measure(settings, watch, model, noise, labels)


def _measure(settings: DemoSettings, watch: Observer, model: nn.Module, noise: Tensor, labels: Tensor) -> DemoRun:
    models: dict[str, nn.Module] = {ORIGINAL: model}
    inputs = moeca_fx.zoo.example_inputs(model, batch=settings.batch)
    watch.stage("tracing and vectorising")
    vectorised = moeca_fx.transform(model, example_inputs=inputs, policy=None, compile=settings.compile)
    watch.stage("inserting caches")
    cached = vectorised.with_policy(moeca_fx.MoECa(interval=settings.interval))
    models |= {VECTORISED: vectorised, CACHED: cached}

    watch.stage("compiling and warming up" if settings.compile else "warming up")
    for each in models.values():
        sampling.sample(each, noise, labels, steps=settings.interval + 1)
        if isinstance(each, TransformedModel):  # what is reported is what was timed
            each.reset()
            each.reset_stats()

    watch.stage("sampling")
    trajectories = {
        name: partial(_trajectory, each, noise, labels, settings.steps, watch) for name, each in models.items()
    }
    seconds, images = time_interleaved(trajectories, settings.repeats)

    watch.stage("comparing the images")
    variants = tuple(_variant(name, models[name], seconds, images, labels) for name in (ORIGINAL, VECTORISED, CACHED))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return DemoRun(DemoResult(settings, parameters, variants), images, labels)


def _trajectory(model: nn.Module, noise: Tensor, labels: Tensor, steps: int, watch: Observer) -> Tensor:
    return sampling.sample(model, noise, labels, steps=steps, progress=lambda *_: watch.step())


def _variant(
    name: str,
    model: nn.Module,
    seconds: dict[str, tuple[float, ...]],
    images: dict[str, Tensor],
    labels: Tensor,
) -> VariantResult:
    own, reference = images[name], images[ORIGINAL]
    statistics = model.stats() if isinstance(model, TransformedModel) else None
    return VariantResult(
        name=name,
        seconds=seconds[name],
        speedup=median_speedup(seconds[ORIGINAL], seconds[name]),
        flops_speedup=1.0 if statistics is None else statistics.flops_speedup,
        psnr=psnr(own, reference),
        psnr_worst=float(psnr_per_image(own, reference).min()),
        ssim=ssim(own, reference),
        accuracy=classifier.accuracy(own, labels),
        reuse_ratio=statistics.reuse_ratio if name == CACHED and statistics is not None else None,
        cache_bytes=model.memory().total if isinstance(model, TransformedModel) else 0,
    )
