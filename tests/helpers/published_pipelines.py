"""Tiny random pipelines of diffusers around HiDream and Nucleus; prompts are embeddings, nothing is downloaded."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    NucleusMoEImagePipeline,
)
from torch import Tensor

from tests.helpers import hidream, nucleus
from tests.helpers.requests import noise

HIDREAM, NUCLEUS = hidream.SIZES["square"], nucleus.SIZES["sigmoid"]


def hidream_pipeline(scheduler: Any = None) -> HiDreamImagePipeline:
    """Guidance in one batch of the denoiser; latents of 64 numbers a channel whatever their shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4, shift_factor=0.1
        )
    unused = ("text_encoder", "tokenizer")
    absent = {f"{name}{number}": None for name in unused for number in ("", "_2", "_3", "_4")}
    pipe = HiDreamImagePipeline(
        transformer=hidream.build(HIDREAM),
        vae=vae.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        **absent,
    )
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def nucleus_pipeline(scheduler: Any = None) -> NucleusMoEImagePipeline:
    """Guidance by a second call of the denoiser, without a name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    pipe = NucleusMoEImagePipeline(
        transformer=nucleus.build(NUCLEUS),
        vae=vae.eval(),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        processor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, seed: int = 0, batch: int = 1, steps: int = 6, **more: Any) -> Tensor:
    """Images of one request to either pipeline, [B, 3, H, W]; `more` overrides arguments of the call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    given: dict[str, Any] = {"height": 8, "width": 8}
    if isinstance(pipe, HiDreamImagePipeline):
        for prefix in ("", "negative_"):
            given[f"{prefix}prompt_embeds_t5"] = normal(batch, 5, hidream.T5)
            given[f"{prefix}prompt_embeds_llama3"] = normal(HIDREAM.layers, batch, 6, hidream.LLAMA)
            given[f"{prefix}pooled_prompt_embeds"] = normal(batch, hidream.POOLED)
    else:
        given |= {"height": 8, "width": 24}
        # Without padding the pipeline drops the mask; the negative prompt is padded.
        for prefix, padding in (("", 0), ("negative_", 2)):
            mask = torch.ones(batch, nucleus.PROMPT, dtype=torch.long)
            mask[:, nucleus.PROMPT - padding :] = 0
            given[f"{prefix}prompt_embeds"] = normal(batch, nucleus.PROMPT, nucleus.TEXT)
            given[f"{prefix}prompt_embeds_mask"] = mask
    images: Tensor = pipe(num_inference_steps=steps, generator=noise(seed), output_type="pt", **given | more).images
    return images
