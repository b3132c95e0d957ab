"""Move full steps one at a time, judged by the final images themselves: what no linear estimate sees."""

import math
import random
import time
from collections.abc import Callable, MutableMapping

from torch import Tensor

from moeca_fx.calibration.calibration import Calibration
from moeca_fx.calibration.record import Model, Recording, Sampler
from moeca_fx.calibration.replay import Replay

Fit = Callable[[tuple[int, ...]], Calibration]


def image_loss(images: Tensor, reference: Tensor) -> float:
    """Mean over samples of the log of the squared error: one image that tips over does not decide a search."""
    error = (images - reference).double().pow(2).flatten(1).mean(1)
    return float((error + 1e-12).log().mean())


def polish(
    start: Calibration,
    fit: Fit,
    recording: Recording,
    sampler: Sampler,
    model: Model,
    *,
    seconds: float = math.inf,
    tries: int = 100,
    seed: int = 0,
    losses: MutableMapping[tuple[int, ...], float] | None = None,
) -> Calibration:
    """Local search over schedules from `start`, refitting the weights of every candidate.

    Each try moves one full step (never step 0) to a free neighbour up to three steps away; it is kept when the images
    on the calibration batch come closer to the recorded ones.

    Args:
        fit: gives a calibration for a list of full steps, e.g. `fit_weights` with everything else bound.
        seconds: stops starting new tries after this time.
        tries: and after this many.
        seed: of the order of tries.
        losses: of schedules tried before; those tried now are added. Makes an interrupted search cheap to repeat.

    Returns:
        The best calibration found; `start` itself if none is better.
    """
    chooser = random.Random(seed)
    deadline = time.monotonic() + seconds
    known = {} if losses is None else losses

    def judge(full: tuple[int, ...], fitted: Calibration) -> float:
        if full not in known:
            known[full] = image_loss(sampler(Replay(model, fitted)), recording.final)
        return known[full]

    best, best_loss = start, judge(start.full, start)
    tried = {start.full}
    for _ in range(tries):
        if time.monotonic() >= deadline:
            break
        candidate = _neighbour(best.full, recording.steps, chooser)
        if candidate in tried:
            continue
        tried.add(candidate)
        if known.get(candidate, -math.inf) >= best_loss:
            continue
        fitted = fit(candidate)
        loss = judge(candidate, fitted)
        if loss < best_loss:
            best, best_loss = fitted, loss
    return best


def _neighbour(full: tuple[int, ...], steps: int, chooser: random.Random) -> tuple[int, ...]:
    """`full` with one step moved; unchanged if the drawn move is not possible."""
    if len(full) < 2:
        return full
    moved = chooser.choice(full[1:])
    target = moved + chooser.choice((-3, -2, -1, 1, 2, 3))
    if target in full or not 0 < target < steps:
        return full
    return tuple(sorted({*full, target} - {moved}))
