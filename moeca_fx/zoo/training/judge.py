"""Train a judge: ``python -m moeca_fx.zoo.training.judge --model NAME --out FILE``, a minute or two on one thread.

Plain cross-entropy on the task's learning split with AdamW and a cosine to zero. Images get uniform noise of half
a grey level, as the generator's do.
"""

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_fx.errors import ConfigError
from moeca_fx.zoo.judge import Judge, build_judge, merge_look_alikes
from moeca_fx.zoo.training.task import TASKS, Task, find_task
from moeca_fx.zoo.training.train import export

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JudgeOptions:
    """Options that shape the result.

    Attributes:
        steps: optimiser steps.
        batch: images per step.
        seed: of weights, batches and noise.
        learning_rate: at the start of the cosine.
    """

    steps: int = 2500
    batch: int = 128
    seed: int = 0
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.learning_rate <= 0:
            raise ConfigError("JudgeOptions: steps and batch must be at least 1 and learning_rate positive")


def train_judge(task: Task, options: JudgeOptions, after_step: Callable[[int, float], None] | None = None) -> Judge:
    """Train from scratch; moves the global generator.

    Args:
        task: its learning split is learnt.
        options: the run's options.
        after_step: called as `after_step(steps_done, loss)`.
    """
    torch.manual_seed(options.seed)
    images, labels = task.load_split()[0]
    judge = build_judge(task.name).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        pick = torch.randint(len(images), (options.batch,))
        jitter = (torch.rand(options.batch, *images.shape[1:]) * 2 - 1) * (task.grey_step / 2)
        loss = F.cross_entropy(judge(images[pick] + jitter), labels[pick])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step + 1, float(loss.detach()))
    return judge.eval().requires_grad_(False)


def held_out_accuracy(judge: Judge, task: Task) -> tuple[float, float]:
    """Share of the held-out images recognised, and the same with look-alikes merged."""
    images, labels = task.load_split()[1]
    found = judge.predict(images)
    merged = merge_look_alikes(found, task.look_alikes) == merge_look_alikes(labels, task.look_alikes)
    return _share(found == labels), _share(merged)


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)


def main() -> None:
    """Train with a progress log, report the held-out accuracy, write the weights in half precision."""
    parser = argparse.ArgumentParser(description="Train a judge of moeca_fx's zoo.")
    parser.add_argument("--model", choices=tuple(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads for torch")
    for option in fields(JudgeOptions):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default), default=option.default)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    options = JudgeOptions(**{field.name: getattr(arguments, field.name) for field in fields(JudgeOptions)})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    task, report_every = find_task(arguments.model), math.ceil(options.steps / 10)

    def after_step(done: int, loss: float) -> None:
        if done % report_every == 0:
            log.info("step %d of %d, loss %.4f", done, options.steps, loss)

    judge = train_judge(task, options, after_step)
    export(judge.state_dict(), arguments.out)
    top, merged = held_out_accuracy(judge, task)
    log.info("held-out accuracy %.2f %%, look-alikes merged %.2f %%", 100 * top, 100 * merged)
    log.info("weights written to %s", arguments.out)


if __name__ == "__main__":
    main()
