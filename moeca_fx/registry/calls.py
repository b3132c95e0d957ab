"""What the modules of entries were called with in the runs of discovery, which are not run again for them."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moeca_fx.batch import batch_size
from moeca_fx.discover.calls import Call
from moeca_fx.discover.method import replaced_method
from moeca_fx.registry.entry import Entry


@dataclass
class Recording:
    """Calls of the entries' regions.

    Attributes:
        runs: calls by module path, a dictionary for each run of the model.
        running: whether the model is.
    """

    runs: list[dict[str, list[Call]]] = field(default_factory=list)
    running: bool = False


@contextmanager
def recorded(model: nn.Module, places: Mapping[str, Entry]) -> Iterator[Recording]:
    """Inside the block every run of the model keeps copies of what the regions of `places` are called with."""
    recording = Recording()
    if not places:
        yield recording
        return
    samples = [0]

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.runs.append({path: [] for path in places})
        samples[0], recording.running = batch_size(args, kwargs), True

    def end(_module: nn.Module, _args: Any, _output: Any) -> None:
        recording.running = False

    with ExitStack() as stack:
        for path, entry in places.items():
            owner = model.get_submodule(path)
            if callable(original := getattr(owner, entry.region, None)):  # else its proof says so
                spy = _spy(original, path, recording, samples)
                stack.enter_context(replaced_method(owner, entry.region, spy))
        for handle in (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end),
        ):
            stack.callback(handle.remove)
        yield recording


def _spy(original: Callable[..., Any], path: str, recording: Recording, samples: list[int]) -> Callable[..., Any]:
    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    @functools.wraps(original)
    def spy(*args: Any, **kwargs: Any) -> Any:
        if recording.running:
            given, named = pytree.tree_map(copied, (args, kwargs))
            recording.runs[-1][path].append(Call(given, named, samples[0]))
        return original(*args, **kwargs)

    return spy
