"""Fewer, better steps: rectified-flow models sampled with diffusers' multistep solvers.

The peers that need no cache. Our time runs from noise at t = 0 to data at t = 1 with velocity v = data - noise;
diffusers' flow schedulers run sigma = 1 - t from 1 to 0 and want noise - data, that is -v.

The model is asked at exactly the times of the grid. DPM-Solver++ has no way to be told a grid of sigmas (it derives
one that starts at 0.999), so its public `sigmas` are overwritten; at sigma = 1 its formulas have finite limits. UniPC
takes the grid but moves sigma = 1 by 1e-6 against a logarithm of zero.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moeca_fx.errors import ConfigError, InputError, require
from moeca_fx.zoo.sampling import FRESH_NOISE

EXTRA = "peers"
STOCHASTIC = "sde-dpmsolver++"
SOLVERS: dict[str, tuple[int, ...]] = {
    "euler": (1,),
    "dpmsolver++": (1, 2, 3),
    "unipc": (1, 2, 3),
    STOCHASTIC: (1, 2),
}
"""Orders of each solver. `sde-dpmsolver++` of order 1 is this package's ancestral sampler; its order 3 does not
converge along a fixed noise path (measured on Gaussian data, diffusers 0.42) and is left out. UniPC corrects each step
with the next model call, so its order 1 behaves like an order 2."""


@torch.no_grad()
def sample_with_solver(
    model: Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, ...]],
    noise: Tensor,
    labels: Tensor,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    solver: str = "dpmsolver++",
    order: int = 2,
    times: Sequence[float] | None = None,
    fresh: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw one image per row of `noise`, as `moeca_fx.zoo.sampling.sample` does.

    Args:
        model, noise, labels, steps, progress: as there.
        solver: one of `SOLVERS`: ``"euler"`` (FlowMatchEulerDiscreteScheduler, equal to this package's own),
            ``"dpmsolver++"`` (arXiv 2211.01095), ``"unipc"`` (arXiv 2302.04867), ``"sde-dpmsolver++"`` (stochastic).
        order: of the solver; its first steps and its last are of lower order.
        times: where each step begins, rising from 0; ``i / steps`` by default.
        fresh: noise of each step of the stochastic solver, each like `noise`; drawn as `sample` does by default.
        seed: of that noise.

    Returns:
        [B, C, S, S].

    Raises:
        ConfigError: unknown solver, or an order that it does not have.
        InputError: `steps` < 1, `times` or `fresh` of another length, or batches that differ.
        MissingExtraError: diffusers is not installed.
    """
    grid = [step / steps for step in range(max(steps, 0))] if times is None else list(times)
    _check(noise, labels, steps, solver, order, grid)
    scheduler = _scheduler(solver, order, [1 - t for t in grid])
    draws = _draws(noise, steps, seed) if solver == STOCHASTIC and fresh is None else fresh
    if solver == STOCHASTIC and (draws is None or len(draws) != steps):
        raise InputError(f"sample_with_solver: expected fresh noise for {steps} steps")
    x = noise.clone()
    for step, t in enumerate(grid):
        output = model(x, torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device), labels)
        velocity = (output if isinstance(output, Tensor) else output[0])[:, : x.shape[1]]
        extra = {"variance_noise": draws[step]} if solver == STOCHASTIC and draws is not None else {}
        x = scheduler.step(-velocity, scheduler.timesteps[step], x, return_dict=False, **extra)[0]
        if progress is not None:
            progress(step + 1, steps)
    return x


def _check(noise: Tensor, labels: Tensor, steps: int, solver: str, order: int, grid: list[float]) -> None:
    if solver not in SOLVERS:
        raise ConfigError(f"no solver is called {solver!r}; solvers: {', '.join(SOLVERS)}")
    if order not in SOLVERS[solver]:
        raise ConfigError(f"{solver}: expected an order of {', '.join(map(str, SOLVERS[solver]))}, found {order}")
    if steps < 1:
        raise InputError(f"sample_with_solver: steps must be at least 1, got {steps}")
    if noise.shape[0] != labels.shape[0]:
        raise InputError(f"sample_with_solver: noise has batch {noise.shape[0]} but labels have {labels.shape[0]}")
    rising = all(a < b for a, b in zip(grid, [*grid[1:], 1.0], strict=True))
    if len(grid) != steps or grid[0] != 0 or not rising:
        raise InputError(
            f"sample_with_solver: expected {steps} times that rise from 0 and stay below 1, found {len(grid)}"
        )


def _scheduler(solver: str, order: int, sigmas: list[float]) -> Any:
    """A diffusers scheduler on this grid, which ends at sigma = 0; started at its first step."""
    require("diffusers.schedulers", EXTRA)
    schedulers = import_module("diffusers.schedulers")
    flow = {"solver_order": order, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if solver == "euler":
        scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=sigmas)
    elif solver == "unipc":
        scheduler = schedulers.UniPCMultistepScheduler(**flow)
        scheduler.set_timesteps(sigmas=import_module("numpy").array(sigmas))  # a list fails in 0.42
    else:
        scheduler = schedulers.DPMSolverMultistepScheduler(algorithm_type=solver, **flow)
        scheduler.set_timesteps(len(sigmas))
        scheduler.sigmas = torch.tensor([*sigmas, 0.0])
    scheduler.set_begin_index(0)  # its timesteps are whole numbers, which repeat on fine grids
    return scheduler


def _draws(noise: Tensor, steps: int, seed: int) -> list[Tensor]:
    """The fresh noise that `moeca_fx.zoo.sampling.sample` draws; at the last step it counts for nothing."""
    generator = torch.Generator().manual_seed(seed + FRESH_NOISE)
    return [torch.randn(noise.shape, generator=generator).to(noise) for _ in range(steps)]
