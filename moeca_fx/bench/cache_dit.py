"""cache-dit, the package as it is, on a zoo model: an outside check of the methods it shares with this package.

What cache-dit 1.5 does, read from its sources and confirmed by the tests:

- DBCache runs the first F blocks at every step. R is what they added to the tokens; a step is cached when
  ``mean|R - R_last| / mean|R_last| < threshold``, one number for the whole batch, R_last of the last *computed* step.
  A cached step adds the residual of the middle blocks and runs the last B. A threshold of 0 or less never caches,
  one of 1 or more always does, without measuring. The first `warmup` steps are computed (8 by default); the last
  step is not treated specially.
- With TaylorSeer the residual of the middle blocks is extrapolated instead of held: one series for the whole stack,
  not one for each attention and feed-forward as in the paper. Differences begin at the fourth step, because its
  counter starts at -1 and takes none before 2; orders above 1 fill up one computed step at a time.
- A mask of computed steps (`full_steps` here) overrides the threshold: the rest is cached.
- Steps are counted by calls. Without a reset the counter runs on into the next trajectory, also when the number of
  steps is announced: its refresh comes one call late. `CacheDitModel.reset` therefore rebuilds the context.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from moeca_fx.errors import ConfigError, UnsupportedModelError, require
from moeca_fx.model_copy import share_weights
from moeca_fx.zoo.dsmoe import DSMoE

EXTRA = "peers"


@dataclass(frozen=True)
class CacheDitSettings:
    """What cache-dit is told; the defaults are its own.

    Attributes:
        first: blocks computed at every step before the decision (its ``Fn_compute_blocks``), >= 1.
        last: blocks computed at every step after the cached residual (``Bn_compute_blocks``), >= 0.
        threshold: relative change of the first blocks' residual below which a step is cached.
        warmup: steps at the start that are always computed (``max_warmup_steps``).
        most_in_a_row: cached steps in a row at most (``max_continuous_cached_steps``); None is no limit.
        order: order of its TaylorSeer on the residual; None holds the residual.
        full_steps: computed steps; with them every other step is cached, whatever the threshold.

    Raises:
        ConfigError: a field is out of range.
    """

    first: int = 8
    last: int = 0
    threshold: float = 0.08
    warmup: int = 8
    most_in_a_row: int | None = None
    order: int | None = None
    full_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("first", 1), ("last", 0), ("warmup", 0), ("most_in_a_row", 0), ("order", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"CacheDitSettings.{name}: expected at least {least}, found {value}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"CacheDitSettings.threshold: expected a finite number, found {self.threshold}")
        if self.full_steps is not None and (0 not in self.full_steps or min(self.full_steps) < 0):
            raise ConfigError(f"CacheDitSettings.full_steps: expected steps from 0 on, found {self.full_steps}")


class CacheDitModel:
    """A DSMoE whose blocks run under cache-dit, called like the model it was made from.

    Args:
        model: left as it is; the weights are shared.
        settings: the cache.

    Raises:
        MissingExtraError: cache-dit is not installed.
        UnsupportedModelError: not a `DSMoE`, or with fewer blocks than `settings` computes.
    """

    def __init__(self, model: nn.Module, settings: CacheDitSettings) -> None:
        if not isinstance(model, DSMoE):
            raise UnsupportedModelError(
                f"cache-dit: expected a DSMoE of the zoo, whose blocks map (tokens, condition) to tokens, "
                f"found {type(model).__name__}"
            )
        if settings.first + settings.last > len(model.blocks):
            raise UnsupportedModelError(
                f"cache-dit: first={settings.first} and last={settings.last} are more than the model's "
                f"{len(model.blocks)} blocks; lower one of them"
            )
        self._library = _load()
        self._model = share_weights(model)
        self._enable(settings)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
        """One step; what the model returns."""
        return self._model(x, t, y)

    def reset(self) -> None:
        """Begin a new trajectory with the next call."""
        self._library.refresh_context(self._model)

    @property
    def cached_steps(self) -> tuple[int, ...]:
        """Steps of the current trajectory that were cached, 0 its first."""
        return tuple(self._stats().cached_steps)

    @property
    def changes(self) -> dict[int, float]:
        """Relative change of the first blocks' residual by step, where it was measured."""
        return {int(step): float(change) for step, change in self._stats().residual_diffs.items()}

    def _enable(self, settings: CacheDitSettings) -> None:
        library = self._library
        adapter = library.BlockAdapter(
            transformer=self._model,
            blocks=self._model.blocks,
            blocks_name="blocks",
            forward_pattern=library.ForwardPattern.Pattern_3,  # tokens in, tokens out, other arguments passed through
            check_forward_pattern=False,  # it insists on the parameter name hidden_states
        )
        cache = library.DBCacheConfig(
            Fn_compute_blocks=settings.first,
            Bn_compute_blocks=settings.last,
            residual_diff_threshold=settings.threshold,
            max_warmup_steps=settings.warmup,
            max_continuous_cached_steps=-1 if settings.most_in_a_row is None else settings.most_in_a_row,
            enable_separate_cfg=False,
            steps_computation_mask=_mask(settings.full_steps),
            steps_computation_policy="static",
        )
        taylor = None
        if settings.order is not None:
            taylor = library.TaylorSeerCalibratorConfig(taylorseer_order=settings.order)
        library.enable_cache(adapter, cache_config=cache, calibrator_config=taylor)

    def _stats(self) -> Any:
        return self._library.summary(self._model, logging=False)[0]


def _load() -> Any:
    require("cache_dit", EXTRA)
    library = import_module("cache_dit")
    for handler in logging.getLogger("CACHE_DIT").handlers:  # it reports every set-up on standard output
        handler.setLevel(logging.ERROR)
    return library


def _mask(full_steps: Sequence[int] | None) -> list[int] | None:
    """1 for a computed step, 0 for a cached one; steps past its end are cached."""
    if full_steps is None:
        return None
    return [int(step in full_steps) for step in range(max(full_steps) + 1)]
