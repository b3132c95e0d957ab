"""Tiny random diffusers pipelines around a mixture-of-experts transformer; nothing is downloaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.toys import WIDTH, Blend, Mixing, Storey, Wedge

TEXT = 5  # tokens of a prompt


def _as_it_is(image: Tensor) -> Tensor:
    return image


class TinyMoE(ModelMixin, ConfigMixin, CacheMixin):
    """A class- or text-conditioned transformer over patches of 2 x 2, with experts unless it is dense."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        sample_size: int = 4,
        num_layers: int = 1,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.enter = nn.Conv2d(in_channels, WIDTH, 2, stride=2)
        self.label = nn.Embedding(1001, WIDTH)
        self.text = nn.Linear(WIDTH, WIDTH)
        self.storeys = nn.ModuleList(Storey(Wedge if dense else Blend, Mixing) for _ in range(num_layers))
        self.leave = nn.Linear(WIDTH, 4 * out_channels)
        self.finish = _as_it_is
        self.register_buffer("pitch", torch.logspace(0, -2, WIDTH // 2), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        height, width = hidden_states.shape[-2] // 2, hidden_states.shape[-1] // 2
        phase = timestep[:, None] * self.pitch.to(hidden_states.dtype)
        mood = torch.cat([phase.sin(), phase.cos()], dim=-1)
        if class_labels is not None:
            mood = mood + self.label(class_labels)
        if encoder_hidden_states is not None:
            mood = mood + self.text(encoder_hidden_states).mean(1)
        stream = self.enter(hidden_states).flatten(2).transpose(1, 2)
        for storey in self.storeys:
            stream = storey(stream, mood)
        image = self.leave(stream).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        image = self.finish(functional.pixel_shuffle(image, 2))
        return Transformer2DModelOutput(sample=image) if return_dict else (image,)


class TextPipeline(DiffusionPipeline):
    """Separate guidance: the transformer is called twice a step, as in many text-to-image pipelines.

    `order` says which call comes first; `names` whether the calls are named with `cache_context`.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: TinyMoE, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        height: int = 4,
        width: int = 4,
        num_inference_steps: int = 8,
        guidance_scale: float = 3.0,
        guided: Callable[[int], bool] = lambda step: True,
        negative_first: bool = False,
        names: bool = False,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> tuple[Tensor]:
        self._interrupt = False
        self.scheduler.set_timesteps(num_inference_steps)
        scales = hasattr(self.scheduler, "scale_model_input")  # flow matching does not
        shape = (len(prompt_embeds), self.transformer.config.in_channels, height, width)
        latents = torch.randn(shape, generator=generator).to(self.transformer.device, self.transformer.dtype)
        latents = latents * self.scheduler.init_noise_sigma if scales else latents
        for step, t in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                continue
            scaled = self.scheduler.scale_model_input(latents, t) if scales else latents
            embeds = {"cond": prompt_embeds}
            if negative_prompt_embeds is not None and guided(step):
                embeds["uncond"] = negative_prompt_embeds
            if negative_first:
                embeds = dict(reversed(embeds.items()))
            noise = {}
            for name, text in embeds.items():
                with self._naming(name if names else None):
                    (noise[name],) = self.transformer(
                        hidden_states=scaled,
                        timestep=t.expand(len(latents)).to(latents.dtype),
                        encoder_hidden_states=text,
                        return_dict=False,
                    )
            towards = noise["cond"]
            if "uncond" in noise:
                towards = noise["uncond"] + guidance_scale * (towards - noise["uncond"])
            latents = self.scheduler.step(towards, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, t, {"latents": latents}).pop("latents", latents)
        self.maybe_free_model_hooks()
        return (latents,)

    @contextmanager
    def _naming(self, name: str | None) -> Iterator[None]:
        if name is None:
            yield
        else:
            with self.transformer.cache_context(name):
                yield


def tiny_moe(seed: int = 0, **config: Any) -> TinyMoE:
    """A seeded transformer in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyMoE(**config).eval().requires_grad_(False)


def dit_pipeline(scheduler: Any = None, **config: Any) -> DiTPipeline:
    """diffusers' class-conditional pipeline with batched guidance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    pipe = DiTPipeline(transformer=tiny_moe(**config), vae=vae, scheduler=scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_pipeline(scheduler: Any = None, **config: Any) -> TextPipeline:
    """Separate guidance."""
    return TextPipeline(transformer=tiny_moe(**config), scheduler=scheduler or DDIMScheduler())


def prompts(batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """prompt_embeds and negative_prompt_embeds, [B, TEXT, WIDTH]."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, batch, TEXT, WIDTH, generator=generator)
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}
