"""From an entry to something that draws images and says what that took."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moeca_fx import policies
from moeca_fx.bench.cache_dit import CacheDitModel, CacheDitSettings
from moeca_fx.bench.entries import Entry
from moeca_fx.bench.fitted import fill_in
from moeca_fx.bench.noise_path import coarse_noise, coarse_steps
from moeca_fx.bench.settings import BenchSettings
from moeca_fx.bench.subject import Subject, Velocity
from moeca_fx.runtime.flops import flop_counter
from moeca_fx.zoo.sampling import sample
from moeca_fx.zoo.solvers import STOCHASTIC, sample_with_solver

OnStep = Callable[[int, int], None]
Draw = Callable[[Velocity, Tensor, Tensor, int, OnStep | None], Tensor]
"""A sampler with everything chosen: velocity, noise, labels, seed of fresh noise, observer -> images."""


@dataclass(frozen=True)
class Work:
    """What the trajectories of a contestant executed.

    Attributes:
        flops: 2 a multiply-add, routing and scoring included.
        full_steps, other_steps: model calls that computed everything, and the rest.
        reuse_ratio, match_ratio: of the routed branches of the rest; None where branches are not what is reused.
        cache_bytes: held at the end of a trajectory; 0 where unknown or none.
    """

    flops: int
    full_steps: int
    other_steps: int = 0
    reuse_ratio: float | None = None
    match_ratio: float | None = None
    cache_bytes: int = 0


class Contestant(Protocol):
    """Draws images; every trajectory begins from nothing."""

    steps: int

    def draw(self, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None = None) -> Tensor:
        """One trajectory of `steps` model calls: images [B, C, S, S]."""

    def work(self) -> Work:
        """Of all trajectories so far."""


class Uncached:
    """Every step costs the same."""

    def __init__(self, velocity: Velocity, draw: Draw, steps: int, flops_per_step: int) -> None:
        self.steps = steps
        self._velocity, self._draw = velocity, draw
        self._flops, self._calls = flops_per_step, 0

    def draw(self, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None = None) -> Tensor:
        """See `Contestant`."""
        self._calls += self.steps
        return self._draw(self._velocity, noise, labels, seed, on_step)

    def work(self) -> Work:
        """See `Contestant`."""
        return Work(self._flops * self._calls, self._calls)


class Cached:
    """The subject under a policy."""

    def __init__(self, subject: Subject, method: Any, draw: Draw, steps: int) -> None:
        self.steps = steps
        self.model = subject.transformed(method)
        self._velocity, self._draw = subject.velocity(self.model), draw

    def draw(self, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None = None) -> Tensor:
        """See `Contestant`."""
        self.model.reset()
        return self._draw(self._velocity, noise, labels, seed, on_step)

    def work(self) -> Work:
        """See `Contestant`."""
        stats = self.model.stats()
        branches = stats.matched_branches > 0
        return Work(
            flops=stats.flops_executed,
            full_steps=stats.full_steps,
            other_steps=stats.cached_steps,
            reuse_ratio=stats.reuse_ratio if branches else None,
            match_ratio=stats.match_ratio if branches else None,
            cache_bytes=self.model.memory().total,
        )


class ByCacheDit:
    """The subject under cache-dit; its FLOPs are counted while it runs, which costs time."""

    def __init__(self, subject: Subject, settings: CacheDitSettings, draw: Draw, steps: int, counting: bool) -> None:
        self.steps = steps
        self._model = CacheDitModel(subject.model, settings)
        self._draw, self._counting = draw, counting
        self._flops = self._calls = self._cached = 0

    def draw(self, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None = None) -> Tensor:
        """See `Contestant`."""
        self._model.reset()
        if not self._counting:
            return self._draw(self._velocity, noise, labels, seed, on_step)
        with flop_counter() as counter:
            images = self._draw(self._velocity, noise, labels, seed, on_step)
        self._flops += counter.get_total_flops()
        self._calls += self.steps
        self._cached += len(self._model.cached_steps)
        return images

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        velocity: Tensor = self._model(x, t, y)[0]
        return velocity[:, : x.shape[1]]

    def work(self) -> Work:
        """See `Contestant`."""
        return Work(self._flops, self._calls - self._cached, self._cached)


def build_contestant(entry: Entry, subject: Subject, settings: BenchSettings, timed: bool = False) -> Contestant:
    """What runs an entry.

    Args:
        timed: leave out what would only slow it down (cache-dit's FLOPs are counted while it runs).

    Raises:
        MoecaError: the policy does not fit the model, or a package is missing.
    """
    fields = fill_in(entry, subject, settings)
    draw, steps = _sampled(settings.sampler, settings.steps), settings.steps
    match entry.kind:
        case "policy":
            return Cached(subject, policies.build(entry.method, **fields), draw, steps)
        case "cache-dit":
            return ByCacheDit(subject, CacheDitSettings(**fields), draw, steps, counting=not timed)
        case "original":
            velocity = subject.velocity(subject.model)
        case "vectorised":
            velocity = subject.velocity(subject.vectorised)
        case "steps" | "solver":
            velocity, steps = subject.velocity(subject.vectorised), fields["steps"]
            draw = _shortened(entry, settings)
    return Uncached(velocity, draw, steps, subject.flops_per_step(settings.batch))


def _sampled(sampler: str, steps: int) -> Draw:
    def draw(velocity: Velocity, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None) -> Tensor:
        return sample(velocity, noise, labels, steps, on_step, sampler=sampler, seed=seed)

    return draw


def _shortened(entry: Entry, settings: BenchSettings) -> Draw:
    """Fewer steps; a stochastic sampler's follow the noise path of the reference."""
    steps = entry.fields["steps"]
    if not settings.stochastic and entry.kind == "steps":
        return _sampled(settings.sampler, steps)
    solver, order = entry.fields.get("solver", STOCHASTIC), entry.fields.get("order", 1)

    def draw(velocity: Velocity, noise: Tensor, labels: Tensor, seed: int, on_step: OnStep | None) -> Tensor:
        if not settings.stochastic:
            return sample_with_solver(velocity, noise, labels, steps, on_step, solver=solver, order=order)
        begins = coarse_steps(steps, settings.steps)
        fresh = coarse_noise(noise, begins, settings.steps, seed)
        times = [begin / settings.steps for begin in begins]
        return sample_with_solver(
            velocity, noise, labels, steps, on_step, solver=solver, order=order, times=times, fresh=fresh
        )

    return draw
