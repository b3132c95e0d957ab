"""diffusers pipelines: `apply` a policy to a pipeline's denoiser, `remove` it again, `stats` of what it did."""

from moeca_fx.pipelines.application import apply, remove, stats

__all__ = ["apply", "remove", "stats"]
