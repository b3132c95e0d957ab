"""MoECa over a whole zoo model, sample by sample: the slow answer that the product is compared with.

A sample never sees another one: a step loops over the batch and keeps one cache for each sample, so that a
sample's result does not depend on its batch by construction.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moeca_fx.zoo import DiTMoE, DSMoE
from moeca_fx.zoo.layers import unpatchify
from tests.reference import blocks
from tests.reference.block_step import BlockState, BlockStep, Config, Counts


class ReferenceMoECa:
    """A zoo model under MoECa, one call of `step` for each denoising step of one trajectory.

    Args:
        model: a `DSMoE` or `DiTMoE` in evaluation mode; it is only read.
        config: the policy's fields; `interval` is the caller's business (see `step`).
    """

    def __init__(self, model: DSMoE | DiTMoE, config: Config) -> None:
        self.model, self.config = model, config
        self.samples: list[list[BlockState]] = []  # [B][depth]
        self.counts: list[Counts] = []  # [depth], of the last step
        self.cached_totals = [Counts() for _ in model.blocks]  # [depth], summed over cached steps
        self.margin = math.inf  # the smallest |s - tau| of the trajectory so far

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, y: Tensor, full: bool) -> Any:
        """Run one denoising step; the first of a trajectory must be full.

        Args:
            x: [B, C, S, S].
            t: timesteps [B].
            y: labels [B].
            full: compute everything and overwrite the cache, else decide site by site.

        Returns:
            What the model returns, its prediction replaced by the reference's.
        """
        depth, batch = len(self.model.blocks), x.shape[0]
        if not self.samples:
            self.samples = [[BlockState() for _ in range(depth)] for _ in range(batch)]
        self.counts = [Counts() for _ in range(depth)]
        predictions = [self._sample_step(b, x[b], t[b], y[b], full) for b in range(batch)]
        if not full:
            for total, counts in zip(self.cached_totals, self.counts, strict=True):
                total.add(counts)
        prediction = torch.stack(predictions)
        output = self.model(x, t, y)
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return prediction

    def _sample_step(self, b: int, x: Tensor, t: Tensor, y: Tensor, full: bool) -> Tensor:
        """One sample's prediction [C', S, S]."""
        model = self.model
        condition = model.t_embedder(t[None])[0] + model.y_embedder(y[None])[0]  # [H]
        tokens = blocks.embed(model, x)  # [T, H]
        inherited: list[int] = []  # the refresh set of the nearest earlier MoE block of this step
        for index, block in enumerate(model.blocks):
            step = BlockStep(block, self.samples[b][index], condition, self.config)
            if full:
                tokens = step.full(tokens)
            elif step.parts is None:
                tokens = step.cached_dense(tokens, inherited)
            else:
                tokens, inherited = step.cached_moe(tokens)
            self.counts[index].add(step.counts)
            self.margin = min(self.margin, step.margin)
        patches = model.final_layer(tokens[None], condition[None])
        return unpatchify(patches, model.config.patch_size, model.config.out_channels)[0]

    def state(self) -> list[dict[str, Tensor]]:
        """The cache of every block, stacked over samples.

        Keys: `attn` [B, T, H], `key`, `value` [B, T, h, d]; a dense block adds `ffn` [B, T, H], a MoE block
        `expert`, `weight` [B, T, k], `feature` [B, T, k, H], `shared` [B, T, H], `activation` [B, E, T].
        """
        return [_stack([sample[index] for sample in self.samples]) for index in range(len(self.model.blocks))]


def _stack(states: list[BlockState]) -> dict[str, Tensor]:
    tensors = {
        "attn": torch.stack([torch.stack(state.attn) for state in states]),
        "key": torch.stack([state.key for state in states]),
        "value": torch.stack([state.value for state in states]),
    }
    if states[0].ffn:
        tensors["ffn"] = torch.stack([torch.stack(state.ffn) for state in states])
        return tensors
    sites = [state.site for state in states]
    features = [[torch.stack([slot.feature for slot in token]) for token in site.slots] for site in sites]
    tensors["expert"] = torch.tensor([[[slot.expert for slot in token] for token in site.slots] for site in sites])
    weights = [[[slot.weight for slot in token] for token in site.slots] for site in sites]
    tensors["weight"] = torch.tensor(weights, dtype=torch.float64)
    tensors["feature"] = torch.stack([torch.stack(tokens) for tokens in features])
    tensors["shared"] = torch.stack([torch.stack(site.shared) for site in sites])
    tensors["activation"] = torch.tensor([site.activation for site in sites], dtype=torch.float64)
    return tensors
