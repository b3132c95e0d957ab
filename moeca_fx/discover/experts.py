"""The experts of a region as modules of one kind: ``rows [M, H] -> rows [M, H]``, however the model holds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeca_fx.discover.inline.sampled import Outputs, spread
from moeca_fx.discover.inline.stacked import stacked_modules
from moeca_fx.discover.records import MoERegion


class KeywordExpert(nn.Module):
    """An expert that takes its rows by keyword."""

    def __init__(self, expert: nn.Module, keyword: str) -> None:
        super().__init__()
        self.expert, self.keyword = expert, keyword
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Rows [M, H] -> [M, H]."""
        return self.expert(**{self.keyword: x})


@dataclass(frozen=True)
class ModuleExperts:
    """Modules run on the same rows."""

    modules: Sequence[nn.Module]

    @property
    def count(self) -> int:
        """E."""
        return len(self.modules)

    def outputs(self, rows: Tensor, most: int) -> Outputs | None:
        """Of rows [J, H], on at most `most` channels; None when they cannot take such rows."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                whole = torch.stack([module(rows) for module in self.modules], 1)  # [J, E, H]
            except (RuntimeError, TypeError, ValueError):
                return None
        return Outputs(whole[..., spread(whole.shape[-1], most)], whole.shape[-1])


def expert_modules(model: nn.Module, region: MoERegion) -> list[nn.Module]:
    """One module an expert that is rewritten, over the model's own weights, in order of expert id."""
    if region.entry is not None:
        return list(region.entry.experts(model.get_submodule(region.path)))
    if region.form is not None:
        return stacked_modules(model.get_submodule(region.container), region.form)
    return [as_expert(model.get_submodule(path), region.keyword) for path in region.experts]


def as_expert(module: nn.Module, keyword: str | None) -> nn.Module:
    """A module that takes its rows by position."""
    return module if keyword is None else KeywordExpert(module, keyword)
