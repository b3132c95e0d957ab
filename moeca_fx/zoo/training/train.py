"""Train a model of the zoo: ``python -m moeca_fx.zoo.training.train --model NAME --out DIR [--resume]``.

Rectified flow (arXiv 2209.03003): x_t = (1 - t) * noise + t * image, and the model regresses the velocity
image - noise at a uniform t. Images get uniform noise of half a grey level, which undoes their rounding. The weights
that ship are the exponential moving average, in half precision.
"""

import argparse
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moeca_fx.errors import require
from moeca_fx.zoo.dsmoe import DSMoE
from moeca_fx.zoo.dsmoe_config import DSMoEConfig
from moeca_fx.zoo.initialize import publish_init_
from moeca_fx.zoo.training.balance import LoadBalancer
from moeca_fx.zoo.training.sorted_experts import sorted_experts
from moeca_fx.zoo.training.state import TrainOptions, TrainState
from moeca_fx.zoo.training.task import TASKS, find_task

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
LOG_EVERY = 100
CLIP_NORM = 1.0


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then a cosine to zero at `options.steps`."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def flow_batch(
    images: Tensor, labels: Tensor, batch: int, grey_step: float, timesteps: str = "uniform"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw one training batch from the global generator.

    Args:
        images: [N, C, S, S] in [-1, 1].
        labels: [N].
        batch: B.
        grey_step: distance of two grey levels; the images get uniform noise of half of it.
        timesteps: "uniform", or "logit-normal" for t = sigmoid(normal), which prefers the middle where the shape of
            an image is decided (arXiv 2403.03206, section 3.1).

    Returns:
        x_t [B, C, S, S], t [B] (one draw in each of B intervals of [0, 1) of equal probability), labels [B], and the
        velocity [B, C, S, S].
    """
    pick = torch.randint(len(images), (batch,))
    target = images[pick] + (torch.rand(batch, *images.shape[1:]) * 2 - 1) * (grey_step / 2)
    noise = torch.randn_like(target)
    t = (torch.arange(batch) + torch.rand(batch)) / batch
    if timesteps == "logit-normal":
        t = torch.special.ndtri(t).sigmoid()
    mix = t.view(-1, 1, 1, 1)
    return (1 - mix) * noise + mix * target, t, labels[pick], target - noise


def start(options: TrainOptions, config: DSMoEConfig) -> TrainState:
    """A seeded model, its optimiser and average, at step 0."""
    torch.manual_seed(options.seed)
    model = DSMoE(config)
    publish_init_(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    return TrainState(model.train(), optimizer, average)


@contextmanager
def bf16_attention() -> Iterator[None]:
    """Attention by plain products, in bf16 too: on a CPU they have the fastest backward."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def train(
    state: TrainState,
    options: TrainOptions,
    data: tuple[Tensor, Tensor],
    grey_step: float,
    until: int | None = None,
    after_step: Callable[[TrainState, float, float], None] | None = None,
) -> None:
    """Run optimiser steps up to `until` (default: all of them), in place.

    Args:
        state: from `start`, possibly restored.
        options: the run's options.
        data: images [N, C, S, S] and labels [N].
        grey_step: see `flow_batch`.
        until: stop before this step.
        after_step: called as `after_step(state, loss, imbalance)`.
    """
    balancer = LoadBalancer(state.model, options.balance_rate)
    try:
        while state.step < (options.steps if until is None else until):
            x, t, y, velocity = flow_batch(*data, options.batch, grey_step, options.timesteps)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(state.step, options)
            with bf16_attention(), sorted_experts(state.model), torch.autocast("cpu", torch.bfloat16):
                prediction = state.model(x, t, y)[0]
            loss = (prediction[:, : velocity.shape[1]].float() - velocity).square().mean()
            state.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP_NORM)
            state.optimizer.step()
            imbalance = balancer.update()
            state.step += 1
            state.update_average(options.ema_decay)
            if after_step is not None:
                after_step(state, float(loss.detach()), imbalance)
    finally:
        balancer.close()


def export(average: dict[str, Tensor], path: Path) -> None:
    """Write averaged weights as half-precision safetensors, atomically."""
    require("safetensors.torch", "zoo")
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: value.half().contiguous() for name, value in average.items()}, partial)
    os.replace(partial, path)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a model of the zoo.")
    parser.add_argument("--model", choices=tuple(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the weights")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
    for option in fields(TrainOptions):
        kind = type(option.default)
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=option.default)
    return parser.parse_args()


def main() -> None:
    """Train with a progress bar, checkpoint regularly, write the averaged weights."""
    require("rich.progress", "demo")
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = TrainOptions(**{field.name: getattr(arguments, field.name) for field in fields(TrainOptions)})
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = find_task(arguments.model)
    checkpoint, weights = arguments.out / CHECKPOINT, arguments.out / chosen.weights.name
    state = start(options, chosen.config)
    if arguments.resume:
        state.restore(checkpoint, options)
    smooth = 0.0

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=options.steps, completed=state.step)

        def after_step(state: TrainState, loss: float, imbalance: float) -> None:
            nonlocal smooth
            smooth = loss if smooth == 0.0 else 0.98 * smooth + 0.02 * loss
            bar.update(task, completed=state.step, description=f"training, loss {smooth:.4f}")
            if state.step % LOG_EVERY == 0:
                log.info("step %d, loss %.4f, busiest expert x%.2f", state.step, smooth, imbalance)
            if state.step % arguments.checkpoint_every == 0 or state.step == options.steps:
                state.save(checkpoint, options)
                export(state.average, weights)

        train(state, options, chosen.load_split()[0], chosen.grey_step, after_step=after_step)
    log.info("weights written to %s", weights)


if __name__ == "__main__":
    main()
