"""A second module tree over the same weights, for what may change modules but not the model."""

import copy
from typing import Any

from torch import nn

from moeca_fx.errors import UnsupportedModelError
from moeca_fx.model_wrappers import is_own_forward
from moeca_fx.reasons import Reason


def share_weights(model: nn.Module) -> nn.Module:
    """Copy the module tree; parameters and buffers are new objects over the same storage."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    try:
        clone = copy.deepcopy(model, memo)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied: {error}; remove locks, open files and the like from it",
            code=Reason.NOT_COPYABLE,
        ) from error
    assert isinstance(clone, nn.Module)
    for module in clone.modules():
        if is_own_forward(module):
            object.__delattr__(module, "forward")  # would hide the forward of the transformed class
    return clone
