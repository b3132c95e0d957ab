"""One more run of the model, with the first sample changed, for what may not happen in a model that is cached.

It shows samples that depend on each other (`independence`), random numbers drawn in eval mode (`randomness`), state
that forward writes (`state`), and a language model: token ids in, no position sees later ones.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.batch import batch_size
from moeca_fx.discover.independence import Call, allowed, change_first_sample, change_of, refuse_mixing, tensors_of
from moeca_fx.discover.randomness import RandomLog, refuse_random, tracked
from moeca_fx.discover.state import State
from moeca_fx.errors import UnsupportedModelError
from moeca_fx.model_checks import run_once
from moeca_fx.reasons import Reason


def check_behaviour(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, before: State
) -> None:
    """Run the model once more and refuse what no cache can serve.

    Args:
        model: in eval mode; its state is set back to `before` when it is refused.
        args, kwargs: inputs of a run; of at least two samples but for a model that takes one alone.
        output: what the model returned on them.
        before: state before any run.

    Raises:
        UnsupportedModelError: forward draws random numbers or writes state, samples depend on each other, or the model
            is a causal language model.
    """
    size = batch_size(args, kwargs)
    given = change_first_sample(model, args, kwargs)
    now = State(model)
    running: list[str] = []
    log = RandomLog(running)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), tracked(model, running), log:
        found = run_once(model, *given)
    try:
        _refuse_state(now.changed())
        refuse_random(log.drawn)
        refuse_mixing(model, args, kwargs, output, found, size)
        _refuse_language_model(model, given, output, found)
    except UnsupportedModelError:
        before.restore()
        raise


def _refuse_state(written: list[str]) -> None:
    if written:
        raise UnsupportedModelError(
            f"{_shortened(written)}: written by forward in eval mode; a model with state of its own cannot be cached, "
            "because cached steps do not run every expert: write it in training mode only",
            code=Reason.STATE,
        )


def _refuse_language_model(model: nn.Module, given: Call, output: Any, found: Any) -> None:
    """Token ids alone go in, and what the first half of the positions gives does not depend on the later half."""
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()]
    ids = [leaf for leaf in tensors if leaf.dim() == 2 and not leaf.is_floating_point()]
    if not ids or any(leaf.is_floating_point() and leaf.dim() > 1 for leaf in tensors):
        return
    tokens = ids[0].shape[1]
    for before, after in zip(tensors_of(output), tensors_of(found), strict=True):
        if before.dim() < 2 or before.shape[1] != tokens:
            continue
        early, late = before[:1, : tokens // 2], before[:1, tokens // 2 :]
        if change_of(early, after[:1, : tokens // 2]) <= allowed(before) < change_of(late, after[:1, tokens // 2 :]):
            raise UnsupportedModelError(
                f"{type(model).__name__}: a causal language model: it takes token ids only, and no position sees later "
                "ones; expected a denoiser, whose forward is called on the same sample again and again: "
                "use a key-value cache instead",
                code=Reason.LANGUAGE_MODEL,
            )


def _shortened(paths: list[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
